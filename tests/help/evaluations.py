"""Content of an evaluation.json, made up."""


def paired(win=(0.62, 0.57, 0.67), difference=(0.43, 0.31, 0.55)):
    return {
        "prompts": 500, "images": 500, "mean_a": 20.56, "mean_b": 20.99, "median_a": 20.5, "median_b": 21.0,
        "difference": difference[0], "difference_interval": difference[1:], "win_rate": win[0], "win_interval": win[1:],
        "ties": 0.01, "p_sign": 1e-4, "detectable": 0.56,
    }  # fmt: skip


def entry(scorer="pickscore", side="dpo", **more):
    found = {"side": side, "scorer": scorer, "paired": paired(), "p": 2e-4, "categories": {}, "gains": [], "losses": []}
    return found | {"worth": None} | more


def evaluation(*results, base="start", prompt="a fox"):
    names = list(dict.fromkeys([base, *(one["side"] for one in results)]))
    sides = [
        {"name": name, "place": f"runs/{name}", "images": 500, "prompts": 500, "unusable": [], "flat": [],
         "protocol": {"sampler": "DDIM", "steps": 20, "guidance": 5.0}}
        for name in names
    ]  # fmt: skip
    scorers = [{"name": one["scorer"], "fingerprint": "ab12", "scale": "20..23", "note": ""} for one in results]
    scorers.append({"name": "fid", "fingerprint": "ab12", "scale": "", "note": "", "higher_is_better": False})
    return {"format": 1, "sides": sides, "scorers": scorers, "results": list(results), "warnings": [prompt], "made": {}}
