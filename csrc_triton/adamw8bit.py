"""AdamW with block-wise 8-bit moments: every parameter in a handful of launches, nothing read back to the host.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   w = w - (lr m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr wd w

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101); Dettmers et al., "8-bit
Optimizers via Block-wise Quantization" (arXiv 2110.02861) for the blocks of 256 and the dynamic map. The gradient is
multiplied by a clipping factor and an inverse loss scale, and the whole step is left out where found_inf is set: all
three are device scalars, as is the step count, so a captured CUDA graph replays correctly.

Moments: one byte per element and one fp32 maximum per block of 256, all parameters in one arena; tensors under 4096
elements keep fp32 moments. A positive v is never rounded to code zero: m over sqrt(0) + eps would be a step a thousand
times too long. Weights: fp32, or bf16 with stochastic rounding. The whole update, weight decay included, is formed in
fp32 and rounded once, so decay is not lost however small lr wd is; the random bits are a pure function of (seed, step,
parameter, element). Elements are counted in memory order, blocks too. A parameter may be a shard of a tensor: blocks
and elements are then those of the whole tensor, and so are the bits of each update. Legend: K parameters, G parameter
groups, A elements of an arena.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from csrc_triton.adamw8bit_kernels import adamw_8bit_kernel, adamw_fp32_kernel, begin_step_kernel
from csrc_triton.dynamic_map import LEVELS, MIDPOINTS
from csrc_triton.language import HAS_TRITON, tl, triton
from csrc_triton.parts import ARENAS, BLOCK, Part, arena
from csrc_triton.philox import Stream, random_bits
from csrc_triton.runtime import PINNED, on_its_device
from csrc_triton.specimen import Specimen

ROWS = 4  # quantisation blocks per program, one per warp
WARPS = 4
STREAM = int(Stream.ROUNDING)
FORMAT = "adamw8bit/1"
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}  # of weights


def factors_reference(hyper: torch.Tensor, step: int) -> torch.Tensor:
    """[G, 5] fp64 -> [G, 8] fp32: the factors of `begin_step_kernel`."""
    lr, beta1, beta2, eps, decay = hyper.unbind(1)
    root = (1.0 - beta2**step).float().sqrt().reciprocal()
    columns = (beta1, 1.0 - beta1, beta2, 1.0 - beta2, lr / (1.0 - beta1**step), root, eps, lr * decay)
    return torch.stack([column.float() for column in columns], dim=1)


def adamw_reference(w, g, m, v, factors):
    """(w, m, v) after one step, all fp32 tensors of one shape; `factors`: one row [8]."""
    b1, c1, b2, c2, rate, root, eps, decay = factors
    m = b1 * m + c1 * g
    v = b2 * v + c2 * (g * g)
    return w - (rate * (m / (v.sqrt() * root + eps)) + decay * w), m, v


def round_stochastic(w: torch.Tensor, key: int, step: int, seed: int, first: int = 0) -> torch.Tensor:
    """fp32 [E] -> bf16 [E] by the 16 random bits of (seed, step, key, element); first: the number of element 0."""
    keys, draws = torch.tensor([[key], [step]], device=w.device)
    words = random_bits(keys, draws, STREAM, seed, w.numel(), first)[0]
    bits = (w.view(torch.int32) + (words >> 16).to(torch.int32)) & -0x10000
    return bits.view(torch.float32).to(torch.bfloat16)


def dequantise(codes: torch.Tensor, maxima: torch.Tensor, signed: bool) -> torch.Tensor:
    """uint8 [B, 256], fp32 [B] -> fp32 [B, 256]"""
    return LEVELS[signed].to(codes.device)[codes.int()] * maxima[:, None]


def quantise(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [B, 256] -> nearest codes uint8 [B, 256] and maxima fp32 [B]; a positive unsigned value never takes code 0."""
    maxima = values.abs().amax(1)
    scaled = values / maxima.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, MIDPOINTS[signed].to(values.device))
    return (codes if signed else torch.where(values > 0, codes.clamp_min(1), codes)).to(torch.uint8), maxima


def _memory_order(x: torch.Tensor) -> torch.Tensor:
    """A flat view of a dense tensor in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments for fp32 or bf16 parameters that all live on one device.

    `lr` may be a 0-d tensor per group (read on the device). Gradients must have the dtype of their parameter. The
    parameters are fixed at construction. For graph capture, weights and gradients must keep their addresses
    (`zero_grad(set_to_none=False)`). `parts`: for each parameter the whole tensor that it is a shard of, which no shard
    may cut inside a block; an empty shard has its place in the list.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
        parts: Sequence[Part] | None = None,
    ):
        self._built = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._parameters = [(p, index) for index, group in enumerate(self.param_groups) for p in group["params"]]
        first = self._parameters[0][0]
        self._device = first.device
        for p, _ in self._parameters:
            assert p.device == self._device, f"parameters on {p.device} and {self._device}: AdamW8bit wants one device"
            assert p.dtype in TRITON_DTYPES, f"AdamW8bit updates float32 and bfloat16 weights, not {p.dtype}"
            assert p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last), (
                f"not dense: strides {p.stride()}"
            )
        if parts is None:
            parts = [Part((p.numel(),), 0, 0 if p.is_contiguous() else 1) for p, _ in self._parameters]
        for (p, _), part in zip(self._parameters, parts, strict=True):
            assert p.numel() == part.counts[part.rank], f"a shard of {p.numel()} elements: {part}"
            assert not part.cuts_a_block(), f"a shard cuts a block of {BLOCK}: {part}"
        self._parts = list(parts)
        self._starts, sizes = arena(parts, [part.units[part.rank] for part in parts])

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._tensors = {
            "step": zeros(1, dtype=torch.int64),
            "seed": torch.tensor([seed], device=self._device),
            "m_8bit": zeros(sizes[1], dtype=torch.uint8).fill_(127),
            "v_8bit": zeros(sizes[1], dtype=torch.uint8),
            "m_max": zeros(sizes[1] // BLOCK),
            "v_max": zeros(sizes[1] // BLOCK),
            "m_fp32": zeros(sizes[0]),
            "v_fp32": zeros(sizes[0]),
        }
        self._factors, self._one, self._zero = zeros(len(self.param_groups), 8), zeros(1) + 1.0, zeros(1)
        self._maps = [LEVELS[signed].to(self._device) for signed in (True, False)]
        self._hyper_values: list[tuple[float, ...]] = []  # as last uploaded
        self._addresses: list[tuple[int, int]] = []  # of weights and gradients, as in the table
        self._launches: list[
            tuple[bool, torch.dtype, bool, torch.Tensor]
        ] = []  # 8-bit moments, weights' dtype, aligned, chunks
        self._sources: dict[str, torch.Tensor] = {}
        self._built = True

    def add_param_group(self, param_group: dict) -> None:
        if self._built:
            raise ValueError(
                "AdamW8bit's arena is laid out at construction: pass every parameter group to the constructor"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None, *, clip=None, inv_scale=None, found_inf=None):
        """One update. clip, inv_scale, found_inf: fp32 device tensors of one element, by default 1, 1 and 0."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scalars = [self._one if clip is None else clip, self._one if inv_scale is None else inv_scale]
        scalars.append(self._zero if found_inf is None else found_inf)
        for scalar in scalars:
            assert scalar.numel() == 1 and scalar.dtype == torch.float32 and scalar.device == self._device, (
                f"clip, inv_scale and found_inf are one fp32 each on {self._device}: got {scalar.dtype} on {scalar.device}"
            )
        self._match_gradients()
        self._refresh_hyper()
        if HAS_TRITON and self._device.type == "cuda":
            self._launch_step(*scalars)
        else:
            self._reference_step(*scalars)
        return loss

    def _match_gradients(self) -> None:
        """Gradients in the memory order of their parameter and at 16 bytes: one that lies otherwise is copied."""
        for p, _ in self._parameters:
            if p.grad is not None:
                assert p.grad.dtype == p.dtype, f"gradient {p.grad.dtype} of a {p.dtype} parameter"
                if p.grad.stride() != p.stride() or p.grad.data_ptr() % 16:
                    p.grad = torch.empty_like(p).copy_(p.grad)

    def _upload(self, name: str, values: list, dtype: torch.dtype) -> torch.Tensor:
        """`values` on the device, from pinned memory on a GPU so that the host does not wait.

        The pinned source is kept, since a captured graph reads it again at every replay.
        """
        self._sources[name] = torch.tensor(values, dtype=dtype, pin_memory=self._device.type == "cuda")
        return self._sources[name].to(self._device, non_blocking=self._device.type == "cuda")

    def _refresh_hyper(self) -> None:
        rows = [(g["lr"], *g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        values = [tuple(0.0 if torch.is_tensor(x) else float(x) for x in row) for row in rows]
        if values != self._hyper_values:
            self._hyper, self._hyper_values = self._upload("hyper", values, torch.float64), values
        for index, row in enumerate(rows):
            if torch.is_tensor(row[0]):
                self._hyper[index, 0].copy_(row[0].squeeze(), non_blocking=self._device.type == "cuda")

    def _refresh_table(self) -> None:
        """Rebuilds the table of addresses when a weight or gradient has moved. One launch per kind of moments and
        dtype.
        """
        addresses = [(p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()) for p, _ in self._parameters]
        if addresses == self._addresses:
            return
        rows: list[tuple[int, ...]] = []
        chunks: dict[tuple[bool, torch.dtype, bool], list[tuple[int, int]]] = {}
        for key, ((p, group), part, start, (weight, grad)) in enumerate(
            zip(self._parameters, self._parts, self._starts, addresses, strict=True)
        ):
            assert weight % 16 == 0 and grad % 16 == 0, "AdamW8bit needs weights and gradients that start on 16 bytes"
            quantised, tiles = part.quantised, -(-p.numel() // (ROWS * BLOCK))
            rows.append((weight, grad, p.numel(), start // BLOCK if quantised else start, group, key, part.first))
            kind = quantised, p.dtype, quantised and p.numel() % 16 == 0
            if tiles:
                chunks.setdefault(kind, []).extend((key, tile) for tile in range(tiles))
        self._table = self._upload("table", rows, torch.int64)
        if not self._launches:
            self._launches = [
                (*kind, self._upload(f"chunks {kind}", pairs, torch.int32)) for kind, pairs in chunks.items()
            ]
        self._addresses = addresses

    @on_its_device
    def _launch_step(self, clip, inv_scale, found_inf) -> None:
        self._refresh_table()
        t = self._tensors
        groups, block_g = len(self.param_groups), triton.next_power_of_2(len(self.param_groups))
        begin_step_kernel[(1,)](
            self._hyper, t["step"], found_inf, self._factors, groups, BLOCK_G=block_g, num_warps=1, **PINNED
        )
        for quantised, dtype, aligned, chunks in self._launches:
            common = (self._table, chunks, self._factors, t["step"], t["seed"], clip, inv_scale, found_inf)
            options = {
                "DTYPE": TRITON_DTYPES[dtype],
                "STREAM": STREAM,
                "ROWS": ROWS,
                "BLOCK": BLOCK,
                "num_warps": WARPS,
            } | PINNED
            if quantised:
                states = (*self._maps, t["m_8bit"], t["v_8bit"], t["m_max"], t["v_max"])
                adamw_8bit_kernel[(len(chunks),)](*common, *states, ALIGNED=aligned, **options)
            else:
                adamw_fp32_kernel[(len(chunks),)](*common, t["m_fp32"], t["v_fp32"], **options)

    def _reference_step(self, clip, inv_scale, found_inf) -> None:
        if found_inf.item() != 0.0:
            return
        t = self._tensors
        t["step"] += 1
        step, seed = t["step"].item(), t["seed"].item()
        factors = factors_reference(self._hyper, step)
        for key, ((p, group), part, start) in enumerate(zip(self._parameters, self._parts, self._starts, strict=True)):
            if p.grad is None or not p.numel():
                continue
            flat, count = _memory_order(p), p.numel()
            w, g = flat.float(), _memory_order(p.grad).float() * (clip * inv_scale)
            if not part.quantised:
                m, v = t["m_fp32"][start : start + count], t["v_fp32"][start : start + count]
                w, new_m, new_v = adamw_reference(w, g, m, v, factors[group])
                m.copy_(new_m), v.copy_(new_v)
            else:
                w = self._reference_8bit(w, g, start, factors[group])
            flat.copy_(w if p.dtype == torch.float32 else round_stochastic(w, key, step, seed, part.first))

    def _reference_8bit(self, w, g, start, factors):
        """Updates the moments of one tensor in place and returns its new weights, fp32 [E]."""
        blocks = -(-w.numel() // BLOCK)
        block, element = slice(start // BLOCK, start // BLOCK + blocks), slice(start, start + blocks * BLOCK)
        w_rows, g_rows = (
            torch.nn.functional.pad(x, (0, blocks * BLOCK - x.numel())).view(blocks, BLOCK) for x in (w, g)
        )
        moments = []
        for name, signed in (("m", True), ("v", False)):
            codes, maxima = (
                self._tensors[f"{name}_8bit"][element].view(blocks, BLOCK),
                self._tensors[f"{name}_max"][block],
            )
            moments.append((codes, maxima, signed))
        m, v = (dequantise(*moment) for moment in moments)
        new_w, *new = adamw_reference(w_rows, g_rows, m, v, factors)
        for values, (codes, maxima, signed) in zip(new, moments, strict=True):
            new_codes, new_maxima = quantise(values, signed)
            codes.copy_(new_codes), maxima.copy_(new_maxima)
        return new_w.reshape(-1)[: w.numel()]

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The live state by name: step, seed, moments (of shards: only theirs), `layout` [K, 2] int64 (elements of the
        whole, memory order).
        """
        layout = [(part.whole, part.order) for part in self._parts]
        return {**self._tensors, "layout": torch.tensor(layout)}

    def _slices(self, name: str, starts: list[int]) -> list[tuple[int, Part, int]]:
        """(start, part, elements per number) of each parameter with moments in the arena `name`, by their `starts`."""
        kind, each = ARENAS[name]
        return [
            (start // each, part, each)
            for part, start in zip(self._parts, starts, strict=True)
            if part.quantised == kind
        ]

    @torch.no_grad()
    def whole_state(self, gather: Callable[[torch.Tensor, list[int]], torch.Tensor | None]) -> dict | None:
        """`state_dict` of the whole parameters, on the CPU, as without shards; None where `gather` gives nothing.

        gather(part [n], counts): the parts of all shards, of `counts` numbers, one after another.
        """
        starts, sizes = arena(self._parts, [sum(part.units) for part in self._parts])
        state = {name: tensor.cpu() for name, tensor in self.state_tensors().items()}
        kept = True
        for name, (kind, each) in ARENAS.items():
            whole = self._tensors[name].new_full((sizes[kind] // each,), 127 if name == "m_8bit" else 0, device="cpu")
            own = self._slices(name, self._starts)
            for (start, part, _), (place, _, _) in zip(own, self._slices(name, starts), strict=True):
                counts = [count // each for count in part.units]
                found = gather(self._tensors[name][start : start + counts[part.rank]], counts)
                kept = found is not None
                if found is not None:
                    whole[place : place + sum(counts)] = found.cpu()
            state[name] = whole
        return {**self.state_dict(), "state": state} if kept else None

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies the state of the whole parameters into place, of shards their part of it.

        The parameters must have the sizes and memory order of the run that saved it. Raises ValueError.
        """
        own = self.state_tensors()
        if tensors.keys() != own.keys():
            raise ValueError(f"not an AdamW8bit state: tensors {sorted(tensors)}, expected {sorted(own)}")
        if not torch.equal(tensors["layout"].cpu(), own["layout"]):
            raise ValueError("this AdamW8bit state belongs to other parameters, or to weights in another memory format")
        starts, _ = arena(self._parts, [sum(part.units) for part in self._parts])
        for name in ("step", "seed"):
            self._tensors[name].copy_(tensors[name])
        for name in ARENAS:
            for (start, part, each), (place, _, _) in zip(
                self._slices(name, self._starts), self._slices(name, starts), strict=True
            ):
                count, before = part.units[part.rank] // each, sum(part.units[: part.rank]) // each
                self._tensors[name][start : start + count].copy_(tensors[name][place + before : place + before + count])

    def state_dict(self) -> dict:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"format": FORMAT, "state": self.state_tensors(), "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        if state_dict.get("format") != FORMAT:
            states = list(state_dict.get("state", {}).values())
            foreign = any({"qmap1", "__bnb_optimizer_quant_state__"} & set(s) for s in states if isinstance(s, dict))
            what = "this is a bitsandbytes optimizer state: AdamW8bit cannot continue from it"
            raise ValueError(what if foreign else "not an AdamW8bit state")
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(f"{len(state_dict['param_groups'])} parameter groups saved, {len(self.param_groups)} here")
        self.load_state_tensors(state_dict["state"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)


def _specimen(name, kernel, dtype: str, moments: str, constants: dict) -> Specimen:
    kinds = dict.fromkeys(("table_ptr", "step_ptr", "seed_ptr"), "*i64") | dict.fromkeys(("m_ptr", "v_ptr"), moments)
    kinds["chunks_ptr"] = "*i32"
    weights = {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]
    constants = {"DTYPE": weights, "STREAM": STREAM, "ROWS": ROWS, "BLOCK": BLOCK} | constants
    signature = {p: kinds.get(p, "*fp32") for p in kernel.arg_names if p not in constants}
    vectors = bool(constants.get("ALIGNED"))
    return Specimen(name, kernel, dtype, signature, constants, WARPS, vector_load=vectors, vector_store=vectors)


AOT_SPECIMENS = [
    *(_specimen("adamw_8bit", adamw_8bit_kernel, dtype, "*u8", {"ALIGNED": True}) for dtype in ("bf16", "fp32")),
    *(_specimen("adamw_fp32", adamw_fp32_kernel, dtype, "*fp32", {}) for dtype in ("bf16", "fp32")),
    Specimen(
        "begin_step", begin_step_kernel, "fp32",
        {"hyper_ptr": "*fp64", "step_ptr": "*i64", "found_inf_ptr": "*fp32", "factors_ptr": "*fp32", "G": "i32"},
        {"BLOCK_G": 2}, 1, vector_load=False, vector_store=False,
    ),
]  # fmt: skip
