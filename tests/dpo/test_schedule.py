"""dpo.schedule: figures of the published schedules, few-step chains, and lambda from the Gaussians it is derived from."""

import hashlib
import itertools
import operator

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal

from csrc_triton.noising import noise_pairs
from dpo.common.errors import UserError
from dpo.credit import discounted_weight, single_shot_weight, step_precision, tables
from dpo.schedule import (
    FLOW_CLASS,
    TURBO_TIMESTEPS,
    Draw,
    FlowSchedule,
    Schedule,
    complete,
    complete_flow,
    flow_from_scheduler,
    from_scheduler,
    noise_path,
    shift_by_tokens,
    to_draw,
    usable_timesteps,
)
from tests.help.worlds import KINDS, make_pipeline

EPSILON = {"prediction_type": "epsilon"}
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def sd15(prediction_type: str = "epsilon", **options) -> Schedule:
    return from_scheduler({**SD15, "prediction_type": prediction_type}, **options)


def test_alphas_are_the_product_of_the_scaled_linear_betas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = sd15()
    assert schedule.alphas_cumprod.dtype == torch.float64 and schedule.length == 1000
    torch.testing.assert_close(schedule.alphas_cumprod, (1 - betas).cumprod(0), rtol=2e-5, atol=0)
    assert torch.equal(schedule.timesteps(), torch.arange(1000))


def test_single_shot_weight_has_the_documented_figures():
    weight = single_shot_weight(sd15())
    assert weight[0].item() == pytest.approx(0.00085, rel=1e-3)
    assert weight[500].item() == pytest.approx(2.62, abs=0.005)
    assert weight[999].item() == pytest.approx(213.6, abs=0.1)
    assert weight.mean().item() == pytest.approx(20.3, abs=0.05)
    assert (weight.diff() > 0).all()


def test_single_shot_weight_on_the_v_error():
    schedule = sd15("v_prediction")
    weight = single_shot_weight(schedule)
    assert weight.mean().item() == pytest.approx(0.63, abs=0.005)
    assert (weight.diff() > 0).all() and weight.max() < 1
    torch.testing.assert_close(weight, single_shot_weight(sd15()) * schedule.alphas_cumprod)


def test_single_shot_weight_is_the_error_of_the_estimated_clean_latents():
    """|x0 - x0_hat|^2 = weight |eps - eps_model|^2 = weight_v |v - v_model|^2, from the definitions of x0_hat."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, guess = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    weights = single_shot_weight(sd15()), single_shot_weight(sd15("v_prediction"))
    for t in (0, 1, 333, 700, 999):
        abar = sd15().alphas_cumprod[t]
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        x0_hat = (x_t - (1 - abar).sqrt() * guess) / abar.sqrt()
        exact = (x0 - x0_hat).square().sum()
        torch.testing.assert_close(weights[0][t] * (eps - guess).square().sum(), exact, rtol=1e-9, atol=0)
        v, v_guess = abar.sqrt() * eps - (1 - abar).sqrt() * x0, abar.sqrt() * guess - (1 - abar).sqrt() * x0
        v_x0_hat = abar.sqrt() * x_t - (1 - abar).sqrt() * v_guess
        v_exact = (x0 - v_x0_hat).square().sum()
        torch.testing.assert_close(weights[1][t] * (v - v_guess).square().sum(), v_exact, rtol=1e-9, atol=0)


def test_weight_is_capped():
    assert single_shot_weight(sd15(), cap=100.0).max() == 100.0
    rescaled = single_shot_weight(sd15(zero_snr=True))
    assert rescaled.isfinite().all() and rescaled[999] == 250.0
    assert (rescaled.diff() >= 0).all()


def test_discounted_weight():
    weight = discounted_weight(sd15(), 0.99475)
    assert weight[999] == 1.0 and weight[998].item() == pytest.approx(0.99475)
    assert weight[0].item() == pytest.approx(0.99475**999)
    assert (weight.diff() > 0).all()
    assert weight[979].item() == pytest.approx(0.9, abs=1e-3)  # 0.9 for each of 50 sampling steps of 20


def test_prediction_type_and_betas_come_from_the_model():
    assert sd15().prediction_type == "epsilon"
    assert sd15("v_prediction").prediction_type == "v_prediction"
    assert sd15(prediction_type="epsilon").prediction_type == "epsilon"
    assert (
        from_scheduler({**SD15, "_class_name": "PNDMScheduler"}).prediction_type == "epsilon"
    )  # as its class declares
    linear = from_scheduler(
        {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 500} | EPSILON
    )
    expected = (1 - torch.linspace(1e-4, 0.02, 500, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(linear.alphas_cumprod, expected, rtol=1e-4, atol=0)
    trained = from_scheduler({"trained_betas": [0.1, 0.2, 0.5], "num_train_timesteps": 3} | EPSILON)
    torch.testing.assert_close(trained.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"beta_schedule": "spiral"}, "spiral is not implemented"),
        ({"beta_end": "0.012"}, "betas that cannot be made"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for num_train_timesteps 1000"),
        ({"beta_end": float("inf")}, "betas that are not between 0 and 1"),
        ({"beta_start": -0.1, "beta_schedule": "linear"}, "betas that are not between 0 and 1"),
        ({"beta_end": 30.0}, "betas that are not between 0 and 1"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps 'x': this trainer knows 1 to 1000"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps 1000.0: this trainer knows 1 to 1000"),
        ({"num_train_timesteps": 10**30}, "this trainer knows 1 to 1000"),
        ({"num_train_timesteps": 0}, "this trainer knows 1 to 1000"),
        ({"_class_name": [], "num_train_timesteps": None}, "needs the name of a class"),
        ({"_class_name": {"a": 1}}, "needs the name of a class"),
    ],
)
def test_betas_that_cannot_be_made_are_one_line(wrong, why):
    with pytest.raises(UserError, match=why) as caught:
        from_scheduler({"_class_name": "DDPMScheduler", **SD15, "prediction_type": "epsilon", **wrong})
    assert "\n" not in str(caught.value)


def test_unknown_prediction_type_is_one_line():
    with pytest.raises(UserError, match="predicts 'sample'; this trainer knows epsilon and v_prediction") as caught:
        sd15("sample")
    assert "\n" not in str(caught.value)


PUBLISHED = {  # noise settings as they stand on the hub; what is not said means what the class declares
    "SD 1.4": (SD15 | {"_class_name": "PNDMScheduler", "trained_betas": None, "clip_sample": False}, "epsilon"),
    "SD 2.1": (SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
    "SDXL": (SD15 | EPSILON | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, "epsilon"),
    "Turbo": (SD15 | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, "epsilon"),
    "DPM++": (SD15 | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "epsilon"),
}


@pytest.mark.parametrize(("config", "kind"), PUBLISHED.values(), ids=PUBLISHED)
def test_what_published_schedulers_leave_out_is_their_class_s_meaning(config, kind):
    full, said = complete(config)
    assert full["prediction_type"] == kind and full["num_train_timesteps"] == 1000 and full | config == full
    unsaid = "prediction_type" not in config
    assert (
        said
        == [f"the model's scheduler says no prediction_type: epsilon, the default of {config['_class_name']}"] * unsaid
    )
    assert torch.equal(from_scheduler(config).alphas_cumprod, sd15().alphas_cumprod)
    assert complete(full) == (full, [])


def test_a_class_that_is_null_is_none():
    assert complete({**SD15, **EPSILON, "_class_name": None}) == complete({**SD15, **EPSILON})


NO_BETAS = "by no schedule of betas"
REFUSED = {
    "EDM": ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, **EPSILON}, NO_BETAS),
    "flow matching": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, NO_BETAS),
    "flow sigmas": (SD15 | EPSILON | {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, NO_BETAS),
    "continuous": (SD15 | {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, NO_BETAS),
    "other alphas": (SD15 | {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}, NO_BETAS),
    "unknown class": (SD15 | EPSILON | {"_class_name": "MyScheduler"}, "does not have .MyScheduler."),
    "no class": (SD15, "says no prediction_type and no class"),
    "no betas": ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}, "says no beta_start"),
    "half of the betas": ({**SD15, "_class_name": "DDIMScheduler", "beta_schedule": None}, "says no beta_schedule"),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED)
def test_schedules_that_would_be_made_up_are_refused(config, words):
    with pytest.raises(UserError, match=words) as caught:
        from_scheduler(config)
    assert "\n" not in str(caught.value)


def test_zero_terminal_snr_rescale():
    plain, rescaled = sd15().alphas_cumprod, sd15(zero_snr=True).alphas_cumprod
    assert rescaled[999] < 1e-12 < plain[999]
    root, expected = rescaled.sqrt(), plain.sqrt()
    expected = (expected - expected[-1]) * expected[0] / (expected[0] - expected[-1])  # Lin et al. 2023, algorithm 1
    torch.testing.assert_close(root, expected, rtol=2e-4, atol=1e-6)
    said = from_scheduler({**SD15, **EPSILON, "rescale_betas_zero_snr": True})
    assert torch.equal(said.alphas_cumprod, rescaled)
    kept = from_scheduler({**SD15, **EPSILON, "rescale_betas_zero_snr": True}, zero_snr=False)
    assert torch.equal(kept.alphas_cumprod, plain)


def test_turbo_chain_and_its_dead_timestep():
    turbo = sd15(turbo=True)
    assert turbo.timesteps().tolist() == [249, 499, 749, 999] == list(TURBO_TIMESTEPS)
    assert torch.equal(turbo.alphas_cumprod, sd15(zero_snr=True).alphas_cumprod)
    assert usable_timesteps(turbo).tolist() == [249, 499, 749]
    kept = sd15(turbo=True, zero_snr=False)
    assert usable_timesteps(kept).tolist() == [249, 499, 749, 999]
    assert 999 not in usable_timesteps(sd15(zero_snr=True)).tolist()


def test_v_prediction_keeps_the_timestep_without_signal():
    """Its target there is -x_0: the two images differ."""
    for turbo in (False, True):
        schedule = sd15("v_prediction", zero_snr=True, turbo=turbo)
        assert torch.equal(usable_timesteps(schedule), schedule.timesteps())
        path = noise_path(schedule, schedule.timesteps(), torch.float64)
        assert path.signal[999] < 1e-6 and path.of_data[999] == -1.0
        assert single_shot_weight(schedule)[999] == 1.0
        before = schedule.alphas_cumprod[749 if turbo else 998]
        torch.testing.assert_close(step_precision(schedule)[999], before)  # beta = 1 = 1 - abar
        torch.testing.assert_close(step_precision(schedule, "posterior")[999], before / (1 - before))


def test_windows():
    assert torch.equal(usable_timesteps(sd15()), torch.arange(1000))
    assert torch.equal(usable_timesteps(sd15(), 200, 700), torch.arange(200, 700))
    assert usable_timesteps(sd15(turbo=True), 300, 800).tolist() == [499, 749]
    for schedule, low, high in ((sd15(turbo=True), 250, 499), (sd15(turbo=True), 900, 1000), (sd15(), 500, 500)):
        with pytest.raises(UserError, match=r"no usable timestep in the window .*--window-low") as caught:
            usable_timesteps(schedule, low, high)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_scheduler_folders_are_read(kind, tmp_path):
    import json

    config = json.loads((make_pipeline(tmp_path / kind, kind) / "scheduler" / "scheduler_config.json").read_text())
    schedule = from_scheduler(config, turbo=kind == "sdxl-turbo")
    assert schedule.prediction_type == ("v_prediction" if kind == "sd2v" else "epsilon")
    if kind != "sdxl-turbo":
        assert torch.equal(schedule.alphas_cumprod, DDPMScheduler(**SD15).alphas_cumprod.double())


# --- lambda_k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma2", ["beta", "posterior"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("chain", ["full", "zero-snr", "turbo", "turbo-kept"])
def test_log_ratio_of_the_two_gaussians(chain, prediction_type, sigma2):
    """log r_k, from the densities of N(mu_model, sigma_k^2) and N(mu_q, sigma_k^2) at the mode of q:
    -(lambda_k/2)|error|^2.
    """
    options = {
        "full": {},
        "zero-snr": {"zero_snr": True},
        "turbo": {"turbo": True},
        "turbo-kept": {"turbo": True, "zero_snr": False},
    }
    schedule = sd15(prediction_type, **options[chain])
    lam = step_precision(schedule, sigma2)
    generator = torch.Generator().manual_seed(0)
    x0, eps, off = torch.randn(3, 64, dtype=torch.float64, generator=generator)
    steps = schedule.timesteps().tolist()
    checked = 0
    for place, k in enumerate(steps):
        if chain in ("full", "zero-snr") and k % 37 and k not in (1, 2, 999):
            continue
        abar = schedule.alphas_cumprod[k]
        before = schedule.alphas_cumprod[steps[place - 1]] if place else torch.tensor(1.0, dtype=torch.float64)
        if abar <= 1e-12 and prediction_type == "epsilon":
            assert lam[k] == 0.0
            continue
        alpha = abar / before
        beta = 1 - alpha
        sigma = (beta if sigma2 == "beta" else beta * (1 - before) / (1 - abar)).sqrt()
        if sigma == 0:
            assert lam[k] == 0.0
            continue
        x_k = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        if prediction_type == "epsilon":
            error = 0.1 * off
            x0_hat = (x_k - (1 - abar).sqrt() * (eps + error)) / abar.sqrt()
        else:
            error = 0.1 * off
            v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
            x0_hat = abar.sqrt() * x_k - (1 - abar).sqrt() * (v + error)

        def mean(clean, before=before, beta=beta, abar=abar, alpha=alpha, x_k=x_k):  # of q(x_{k-1} | x_k, x_0 = clean)
            return (before.sqrt() * beta * clean + alpha.sqrt() * (1 - before) * x_k) / (1 - abar)

        model, posterior = Normal(mean(x0_hat), sigma), Normal(mean(x0), sigma)
        log_ratio = (model.log_prob(mean(x0)) - posterior.log_prob(mean(x0))).sum()
        torch.testing.assert_close(-(lam[k] / 2) * error.square().sum(), log_ratio, rtol=1e-5, atol=1e-9)
        assert lam[k] > 0 and log_ratio < 0
        checked += 1
    assert checked >= (2 if "turbo" in chain else 25)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lambda_is_positive_and_zero_off_the_chain(prediction_type):
    assert (step_precision(sd15(prediction_type)) > 0).all()
    posterior = step_precision(sd15(prediction_type), "posterior")
    assert (posterior[1:] > 0).all() and posterior[0] == 0.0
    turbo = step_precision(sd15(prediction_type, turbo=True))
    last = [999] if prediction_type == "v_prediction" else []
    assert turbo.nonzero().flatten().tolist() == [249, 499, 749, *last]
    posterior = step_precision(sd15(prediction_type, turbo=True), "posterior")
    assert posterior.nonzero().flatten().tolist() == [499, 749, *last]


def test_v_lambda_is_times_abar():
    for sigma2 in ("beta", "posterior"):
        on_v = step_precision(sd15("v_prediction"), sigma2)
        torch.testing.assert_close(on_v, step_precision(sd15(), sigma2) * sd15().alphas_cumprod)


def test_posterior_variance_weighs_more():
    assert (step_precision(sd15(), "posterior")[1:] > step_precision(sd15())[1:]).all()


def test_unknown_variance():
    with pytest.raises(ValueError, match="'beta' or 'posterior', not 'gamma'"):
        step_precision(sd15(), "gamma")


# --- the path as a step uses it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_path_is_the_schedule_s(kind, dtype):
    """x_t and target of diffusers' own scheduler, to the rounding of `dtype`."""
    scheduler = DDPMScheduler(**SD15, prediction_type=kind)
    path = noise_path(from_scheduler(scheduler.config), torch.arange(1000), dtype)
    x, eps = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 998, 999])
    signal, spread, of_noise, of_data = (
        table[t].double().view(-1, 1, 1, 1) for table in (path.signal, path.spread, path.of_noise, path.of_data)
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    close = {"rtol": 0, "atol": 20 * torch.finfo(dtype).eps}
    torch.testing.assert_close(signal * x + spread * eps, scheduler.add_noise(x, eps, t), **close)
    target = eps if kind == "epsilon" else scheduler.get_velocity(x, eps, t)
    torch.testing.assert_close(of_noise * eps + of_data * x, target, **close)
    assert path.needs_data is (kind == "v_prediction") and path.signal.dtype == dtype


def test_drawing_is_keyed_and_stays_among_the_timesteps():
    allowed = torch.tensor([249, 499, 749])
    path = noise_path(sd15(), allowed, torch.float32)
    keys, draws, seed = torch.arange(600), torch.zeros(600, dtype=torch.int64), torch.tensor(3)
    t = path.draw(keys, draws, seed)
    assert set(t.tolist()) == set(allowed.tolist())
    order = torch.randperm(600)
    assert torch.equal(path.draw(keys[order], draws, seed), t[order])
    assert not torch.equal(path.draw(keys, draws + 1, seed), t)


AS_BEFORE = {"epsilon": "3700ecc3dbe5982a6158007c74dbe79e", "v_prediction": "f00f47a3449b0f2fee5ba43407f6bcca"}


@pytest.mark.parametrize("kind", AS_BEFORE)
def test_diffusion_is_to_the_bit_what_it_was_before_there_were_flows(kind):
    """Tables, weight and lambda of DDE, drawn timesteps and x_t: hashes of what the code gave before it knew a second path.

    The betas are made of plain numbers here, so that no library's rounding is in it.
    """
    betas = ((0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * k / 999) ** 2 for k in range(1000))
    abar = list(itertools.accumulate((1 - beta for beta in betas), operator.mul))
    schedule = Schedule(torch.tensor(abar, dtype=torch.float64), kind)
    path = noise_path(schedule, schedule.timesteps(), torch.float32)
    keys, draws, seed = torch.arange(1, 9) * 7_919_393_777, torch.arange(8), torch.tensor(3)
    t = path.draw(keys, draws, seed)
    latents = torch.arange(16 * 4 * 6 * 5).view(16, 4, 6, 5) / 256 - 3
    x_t = noise_pairs(latents, t, path.signal, path.spread, keys, draws, seed)
    credit = tables("dde", schedule)
    numbers = path.signal, path.spread, path.of_noise, path.of_data, credit.weight, credit.precision, t, x_t
    content = b"".join(x.contiguous().numpy().tobytes() for x in numbers)
    assert hashlib.sha256(content).hexdigest()[:32] == AS_BEFORE[kind]


# --- rectified flow ---------------------------------------------------------------------------------------------------

SD3 = {"_class_name": FLOW_CLASS, "num_train_timesteps": 1000, "shift": 3.0}
FLUX = SD3 | {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


FEW = [1.0, 0.9, 0.75, 0.5]


def flow(config: dict, tokens: int | None = None, **options) -> FlowSchedule:
    known, _ = complete_flow(config)
    return flow_from_scheduler(known, mu=None if tokens is None else shift_by_tokens(known, tokens), **options)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_of_a_flow_is_that_of_its_scheduler(shift):
    """The levels of diffusers' scheduler, which computes them in float32 and from the noisiest on."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = flow(SD3 | {"shift": shift})
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(schedule.levels, theirs.sigmas.flip(0).double(), rtol=1e-5, atol=1e-8)
    path = noise_path(schedule, schedule.timesteps(), torch.float64)
    torch.testing.assert_close(path.told(torch.arange(1000)), theirs.timesteps.flip(0).double(), rtol=1e-5, atol=1e-5)
    x, eps = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 998, 999])
    noisy = theirs.scale_noise(x, theirs.timesteps.flip(0)[t], eps)
    signal, spread = path.signal[t].view(-1, 1, 1, 1), path.spread[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(signal * x + spread * eps, noisy.double(), rtol=1e-5, atol=1e-5)
    assert path.needs_data and (path.of_noise == 1).all() and (path.of_data == -1).all()


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63)])
def test_a_dynamic_shift_is_that_of_sampling(tokens, mu, kind):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = FLUX | {"time_shift_type": kind}
    assert shift_by_tokens(config, tokens) == pytest.approx(mu)
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(sigmas=[k / 1000 for k in range(1000, 0, -1)], mu=mu)
    torch.testing.assert_close(flow(config, tokens).levels, theirs.sigmas[:-1].flip(0).double(), rtol=1e-5, atol=1e-8)


def test_a_few_step_model_has_the_levels_that_it_is_sampled_at():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    schedule = flow(SD3, steps=theirs.sigmas[:-1].tolist())
    torch.testing.assert_close(schedule.levels[schedule.timesteps()], theirs.sigmas[:-1].flip(0).double())
    assert torch.equal(usable_timesteps(schedule), torch.tensor(TURBO_TIMESTEPS))  # pure noise is not wasted here
    theirs.set_timesteps(4)
    schedule = flow(SD3, steps=theirs.sigmas[:-1].tolist())
    own = schedule.levels[schedule.timesteps()]
    torch.testing.assert_close(own, theirs.sigmas[:-1].flip(0).double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"_class_name": "DDPMScheduler"}, "is .DDPMScheduler.: a model of flow matching"),
        ({"invert_sigmas": True}, "has invert_sigmas"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0: this trainer knows 1 to 1000"),
        ({"shift": -1}, "says shift -1: a number above 0"),
        ({"base_shift": "x"}, "says base_shift .x.: a number above 0"),
        ({"time_shift_type": "cubic"}, "time_shift_type .cubic.: this trainer knows exponential and linear"),
    ],
)
def test_a_flow_s_scheduler_that_cannot_be_followed_is_refused(wrong, said):
    with pytest.raises(UserError, match=said) as caught:
        complete_flow(FLUX | wrong, "m: ")
    assert str(caught.value).startswith("m: ") and "\n" not in str(caught.value)


def test_what_a_flow_s_scheduler_leaves_out_is_said():
    known, lines = complete_flow({"_class_name": FLOW_CLASS})
    assert known["shift"] == 1.0 and "the model's scheduler says no shift: 1.0" in lines[1]


@pytest.mark.parametrize("sigma2", ["beta", "posterior"])
@pytest.mark.parametrize("chain", ["plain", "shifted", "few"])
def test_log_ratio_of_the_two_gaussians_of_a_flow(chain, sigma2):
    """log r_k = -(lambda_k/2)|error|^2, with the posterior conditioned numerically from the joint Gaussian of a chain
    that has the flow's marginals.
    """
    schedule = flow(SD3 | {"shift": 1.0 if chain == "plain" else 3.0}, steps=FEW if chain == "few" else None)
    lam = step_precision(schedule, sigma2)
    generator = torch.Generator().manual_seed(0)
    x0, eps, off = torch.randn(3, 64, dtype=torch.float64, generator=generator)
    steps = schedule.timesteps().tolist()
    assert lam[steps[0]] == 0.0 and (lam[steps[1:]] > 0).all() and int((lam > 0).sum()) == len(steps) - 1
    for low, k in list(itertools.pairwise(steps))[:: 1 if chain == "few" else 111]:
        before, s = schedule.levels[low], schedule.levels[k]
        slope = (1 - s) / (1 - before)  # x_s = slope x_before + noise has the mean (1 - s) x_0
        added = s**2 - slope**2 * before**2  # and needs this variance for the marginal's s^2
        joint = torch.tensor([[before**2, slope * before**2], [slope * before**2, slope**2 * before**2 + added]])
        torch.testing.assert_close(joint[1, 1], s**2)
        gain = joint[0, 1] / joint[1, 1]
        variance = added if sigma2 == "beta" else joint[0, 0] - gain * joint[1, 0]
        x_s = (1 - s) * x0 + s * eps
        error = 0.1 * off
        x0_hat = x_s - s * (eps - x0 + error)

        def mean(clean, before=before, s=s, gain=gain, x_s=x_s):
            return (1 - before) * clean + gain * (x_s - (1 - s) * clean)

        model, posterior = Normal(mean(x0_hat), variance.sqrt()), Normal(mean(x0), variance.sqrt())
        log_ratio = (model.log_prob(mean(x0)) - posterior.log_prob(mean(x0))).sum()
        torch.testing.assert_close(-(lam[k] / 2) * error.square().sum(), log_ratio, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            single_shot_weight(schedule)[k] * error.square(), (x0_hat - x0).square(), rtol=1e-9, atol=1e-12
        )


def test_a_flow_s_lambda_has_the_documented_forms():
    """(SNR(k-1) - SNR(k)) s_k^2 for the posterior variance, which of diffusion is beta_k / (alpha_k (1 - abar_{k-1}))
    times (1 - abar_k) / abar_k; the sums and tails of the continuum 2 (1 - s) / s.
    """
    schedule = flow(SD3 | {"shift": 1.0})
    s, lam = schedule.levels, step_precision(schedule)
    snr = ((1 - s) / s).square()
    torch.testing.assert_close(step_precision(schedule, "posterior")[1:], (snr[:-1] - snr[1:]) * s[1:].square())
    assert float(lam.sum()) == pytest.approx(10.34, abs=0.01)
    assert [float(lam[s > at].sum()) for at in (0.25, 0.5, 0.75)] == pytest.approx([1.27, 0.386, 0.075], abs=0.005)
    assert float(step_precision(flow(SD3)).sum()) == pytest.approx(8.20, abs=0.01)
    abar = sd15().alphas_cumprod
    snr = abar / (1 - abar)
    torch.testing.assert_close(
        step_precision(sd15(), "posterior")[1:], ((snr[:-1] - snr[1:]) * (1 - abar[1:]) / abar[1:]), rtol=1e-8, atol=0
    )
    weight = single_shot_weight(schedule)
    assert (weight.diff() > 0).all() and weight[-1] == 1.0
    assert float(weight.mean()) == pytest.approx(1 / 3, abs=1e-3)
    assert float(single_shot_weight(flow(SD3)).mean()) == pytest.approx(0.529, abs=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("draw", [Draw("uniform"), Draw("logit-normal"), Draw("logit-normal", 1.0, 0.5)])
def test_levels_follow_the_distribution_that_is_asked_for(draw, shift):
    """Against the distribution function, at every level to the width of the grid."""
    schedule = flow(SD3 | {"shift": shift})
    t = to_draw(schedule, 0, 1000, draw)
    assert (t.diff() >= 0).all()
    s = schedule.levels
    share = torch.bincount(t, minlength=1000).cumsum(0) / t.numel()  # of draws at or below each level
    upper = torch.cat([(s[1:] + s[:-1]) / 2, torch.ones(1, dtype=s.dtype)])
    wanted = (
        upper if draw.kind == "uniform" else Normal(draw.mean, draw.sd).cdf(torch.logit(upper.clamp(max=1 - 1e-12)))
    )
    torch.testing.assert_close(share.double(), wanted, rtol=0, atol=1e-5)
    inside = to_draw(schedule, 200, 700, draw)
    assert int(inside.min()) >= 200 and int(inside.max()) < 700
    assert torch.equal(inside, t[(t >= 200) & (t < 700)])


def test_every_member_of_the_grid_alike():
    assert torch.equal(to_draw(flow(SD3), 100, 900, Draw()), torch.arange(100, 900))
    with pytest.raises(UserError, match="no noise level is ever drawn in the window"):
        to_draw(flow(SD3), 999, 1000, Draw("logit-normal", -20.0, 0.1))
