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

from collections.abc import Iterable, Sequence

import torch

from csrc_triton.adamw8bit_kernels import adamw_8bit_kernel, adamw_fp32_kernel, begin_step_kernel
from csrc_triton.dynamic_map import LEVELS, dequantise, quantise
from csrc_triton.language import HAS_TRITON, tl, triton
from csrc_triton.parts import BLOCK, Gather, Part, arena, chunks_of, gathered, put
from csrc_triton.philox import Stream, random_bits
from csrc_triton.runtime import PINNED, on_its_device
from csrc_triton.specimen import Specimen

ROWS = 4  # quantisation blocks per program, one per warp
WARPS = 4
PIECE = 1024 * BLOCK  # elements the plain form works on at a time: its temporaries are as large, whatever the tensor
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


def _memory_order(x: torch.Tensor) -> torch.Tensor:
    """A flat view of a dense tensor in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


Kind = tuple[bool, torch.dtype, torch.dtype, bool]  # 8-bit moments, dtypes of weights and gradients, aligned


def _dtype_of_gradient(p: torch.Tensor) -> torch.dtype:
    return p.dtype if p.grad_dtype is None else p.grad_dtype


def _tiles(p: torch.Tensor) -> int:
    """Programs that work on a parameter."""
    return -(-p.numel() // (ROWS * BLOCK))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments for fp32 or bf16 parameters that all live on one device.

    `lr` may be a 0-d tensor per group (read on the device). Gradients have the dtype of their parameter, or fp32 where
    its `grad_dtype` says so. The parameters are fixed at construction. For graph capture, weights and gradients must
    keep their addresses (`zero_grad(set_to_none=False)`). `parts`: for each parameter the whole tensor that it is a
    shard of, which no shard may cut inside a block; an empty shard has its place in the list.

    `step` updates every parameter. `begin` and then `step_one` for each do the same, bit for bit, one parameter at a
    time: inside backward, where a gradient is freed as soon as it is used.
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
        self._launches: list[tuple[Kind, torch.Tensor]] = []  # and the chunks of each
        self._alone: dict[int, tuple[tuple[int, ...], torch.Tensor, torch.Tensor]] = {}  # row, table, chunks
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
        scalars = self._scalars(clip, inv_scale, found_inf)
        for p, _ in self._parameters:
            self._match_gradient(p)
        self._refresh_hyper()
        if self._on_kernels:
            self._launch_step(*scalars)
        else:
            self._reference_step(*scalars)
        return loss

    @torch.no_grad()
    def begin(self, found_inf=None) -> None:
        """Counts an update (unless `found_inf` is set) that `step_one` then makes, one parameter at a time."""
        *_, found_inf = self._scalars(None, None, found_inf)
        self._refresh_hyper()
        if self._on_kernels:
            self._launch_begin(found_inf)
        else:
            self._reference_begin(found_inf)

    @torch.no_grad()
    def step_one(self, key: int, *, clip=None, inv_scale=None, found_inf=None) -> None:
        """The update of parameter `key`, counted as they were given, by the count of `begin`. Scalars as in `step`."""
        scalars = self._scalars(clip, inv_scale, found_inf)
        self._match_gradient(self._parameters[key][0])
        if self._on_kernels:
            self._launch_one(key, *scalars)
        elif scalars[2].item() == 0.0:
            self._reference_one(key, *scalars[:2])

    @property
    def _on_kernels(self) -> bool:
        return HAS_TRITON and self._device.type == "cuda"

    def _scalars(self, clip, inv_scale, found_inf) -> list[torch.Tensor]:
        scalars = [self._one if clip is None else clip, self._one if inv_scale is None else inv_scale]
        scalars.append(self._zero if found_inf is None else found_inf)
        for scalar in scalars:
            assert scalar.numel() == 1 and scalar.dtype == torch.float32 and scalar.device == self._device, (
                f"clip, inv_scale and found_inf are one fp32 each on {self._device}: got {scalar.dtype} on {scalar.device}"
            )
        return scalars

    def _match_gradient(self, p: torch.Tensor) -> None:
        """The gradient in the memory order of its parameter and at 16 bytes: one that lies otherwise is copied."""
        if p.grad is not None:
            assert p.grad.dtype == _dtype_of_gradient(p), f"gradient {p.grad.dtype} of a {p.dtype} parameter"
            if p.grad.stride() != p.stride() or p.grad.data_ptr() % 16:
                p.grad = torch.empty_like(p, dtype=p.grad.dtype).copy_(p.grad)

    def _upload(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` on the device, from pinned memory on a GPU so that the host does not wait.

        The pinned source is kept, since a captured graph reads it again at every replay.
        """
        self._sources[name] = values.pin_memory() if self._device.type == "cuda" else values
        return self._sources[name].to(self._device, non_blocking=self._device.type == "cuda")

    def _refresh_hyper(self) -> None:
        rows = [(g["lr"], *g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups]
        values = [tuple(0.0 if torch.is_tensor(x) else float(x) for x in row) for row in rows]
        if values != self._hyper_values:
            self._hyper = self._upload("hyper", torch.tensor(values, dtype=torch.float64))
            self._hyper_values = values
        for index, row in enumerate(rows):
            if torch.is_tensor(row[0]):
                self._hyper[index, 0].copy_(row[0].squeeze(), non_blocking=self._device.type == "cuda")

    def _refresh_table(self) -> None:
        """The table of addresses, made again when a weight or gradient has moved; what each program works on, made once."""
        if not self._launches:
            kinds: dict[Kind, list[int]] = {}
            for key in range(len(self._parameters)):
                kinds.setdefault(self._kind(key), []).append(key)
            counts = [_tiles(p) for p, _ in self._parameters]
            made = {kind: chunks_of(keys, [counts[key] for key in keys]) for kind, keys in kinds.items()}
            self._launches = [
                (kind, self._upload(f"chunks {kind}", pairs)) for kind, pairs in made.items() if len(pairs)
            ]
        addresses = [(p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()) for p, _ in self._parameters]
        if addresses != self._addresses:
            self._table = self._upload("table", torch.tensor([self._row(key) for key in range(len(self._parameters))]))
            self._addresses = addresses

    def _kind(self, key: int) -> Kind:
        """The launch that parameter `key` belongs to: known before its first gradient, and the same ever after."""
        p, quantised = self._parameters[key][0], self._parts[key].quantised
        return quantised, p.dtype, _dtype_of_gradient(p), quantised and p.numel() % 16 == 0

    def _row(self, key: int) -> tuple[int, ...]:
        """Parameter `key` in the kernels' table of addresses."""
        (p, group), part, start = self._parameters[key], self._parts[key], self._starts[key]
        weight, grad = p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr()
        assert weight % 16 == 0 and grad % 16 == 0, "AdamW8bit needs weights and gradients that start on 16 bytes"
        return weight, grad, p.numel(), start // BLOCK if part.quantised else start, group, key, part.first

    @on_its_device
    def _launch_step(self, clip, inv_scale, found_inf) -> None:
        self._refresh_table()
        self._launch_begin(found_inf)
        for kind, chunks in self._launches:
            self._launch(kind, self._table, chunks, clip, inv_scale, found_inf)

    @on_its_device
    def _launch_begin(self, found_inf) -> None:
        groups, block_g = len(self.param_groups), triton.next_power_of_2(len(self.param_groups))
        arguments = (self._hyper, self._tensors["step"], found_inf, self._factors, groups)
        begin_step_kernel[(1,)](*arguments, BLOCK_G=block_g, num_warps=1, **PINNED)

    @on_its_device
    def _launch_one(self, key: int, clip, inv_scale, found_inf) -> None:
        """One parameter, by a table of one row; rows are uploaded anew only where an address has changed."""
        p, row = self._parameters[key][0], self._row(key)
        known = self._alone.get(key)
        if known is None or known[0] != row:
            chunks = known[2] if known else self._upload(f"chunks of {key}", chunks_of([0], [_tiles(p)]))
            known = self._alone[key] = row, self._upload(f"row of {key}", torch.tensor([row])), chunks
        _, table, chunks = known
        self._launch(self._kind(key), table, chunks, clip, inv_scale, found_inf)

    def _launch(self, kind: Kind, table, chunks, clip, inv_scale, found_inf) -> None:
        quantised, dtype, gradient, aligned = kind
        t = self._tensors
        common = (table, chunks, self._factors, t["step"], t["seed"], clip, inv_scale, found_inf)
        dtypes = {"DTYPE": TRITON_DTYPES[dtype], "GRADIENT": TRITON_DTYPES[gradient]}
        options = {**dtypes, "STREAM": STREAM, "ROWS": ROWS, "BLOCK": BLOCK, "num_warps": WARPS, **PINNED}
        if quantised:
            states = (*self._maps, t["m_8bit"], t["v_8bit"], t["m_max"], t["v_max"])
            adamw_8bit_kernel[(len(chunks),)](*common, *states, ALIGNED=aligned, **options)
        else:
            adamw_fp32_kernel[(len(chunks),)](*common, t["m_fp32"], t["v_fp32"], **options)

    def _reference_step(self, clip, inv_scale, found_inf) -> None:
        if found_inf.item() != 0.0:
            return
        self._reference_begin(found_inf)
        for key in range(len(self._parameters)):
            self._reference_one(key, clip, inv_scale)

    def _reference_begin(self, found_inf) -> None:
        self._tensors["step"] += int(found_inf.item() == 0.0)
        self._factors.copy_(factors_reference(self._hyper, self._tensors["step"].item()))

    def _reference_one(self, key: int, clip, inv_scale) -> None:
        (p, group), part, start, t = self._parameters[key], self._parts[key], self._starts[key], self._tensors
        if p.grad is None or not p.numel():
            return
        pieces = zip(_memory_order(p).split(PIECE), _memory_order(p.grad).split(PIECE), strict=True)
        for before, (flat, grad) in zip(range(0, p.numel(), PIECE), pieces, strict=True):
            w, g, begin = flat.float(), grad.float() * (clip * inv_scale), start + before
            if part.quantised:
                w = self._reference_8bit(w, g, begin, self._factors[group])
            else:
                m, v = t["m_fp32"][begin : begin + len(w)], t["v_fp32"][begin : begin + len(w)]
                w, new_m, new_v = adamw_reference(w, g, m, v, self._factors[group])
                m.copy_(new_m), v.copy_(new_v)
            random = key, t["step"].item(), t["seed"].item(), part.first + before
            flat.copy_(w if p.dtype == torch.float32 else round_stochastic(w, *random))

    def _reference_8bit(self, w, g, start, factors):
        """Updates the moments of a piece in place and returns its new weights, fp32 [E]."""
        blocks = -(-w.numel() // BLOCK)
        block, element = slice(start // BLOCK, start // BLOCK + blocks), slice(start, start + blocks * BLOCK)
        w_rows, g_rows = (
            torch.nn.functional.pad(x, (0, blocks * BLOCK - x.numel())).view(blocks, BLOCK) for x in (w, g)
        )
        moments = []
        for name, signed in (("m", True), ("v", False)):
            codes = self._tensors[f"{name}_8bit"][element].view(blocks, BLOCK)
            moments.append((codes, self._tensors[f"{name}_max"][block], signed))
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

    def whole_state(self, gather: Gather) -> dict | None:
        """`state_dict` of the whole parameters, on the CPU, as without shards; None where `gather` gives nothing."""
        found = gathered(self._tensors, self._parts, self._starts, gather)
        if found is None:
            return None
        rest = {name: tensor.cpu() for name, tensor in self.state_tensors().items()}
        return {**self.state_dict(), "state": rest | found}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies the state of the whole parameters into place, of shards their part of it.

        The parameters must have the sizes and memory order of the run that saved it. Raises ValueError.
        """
        own = self.state_tensors()
        if tensors.keys() != own.keys():
            raise ValueError(f"not an AdamW8bit state: tensors {sorted(tensors)}, expected {sorted(own)}")
        if not torch.equal(tensors["layout"].cpu(), own["layout"]):
            raise ValueError("this AdamW8bit state belongs to other parameters, or to weights in another memory format")
        for name in ("step", "seed"):
            self._tensors[name].copy_(tensors[name])
        put(self._tensors, self._parts, self._starts, tensors)

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


def _specimen(name, kernel, dtype: str, moments: str, constants: dict, gradient: str | None = None) -> Specimen:
    kinds = dict.fromkeys(("table_ptr", "step_ptr", "seed_ptr"), "*i64") | dict.fromkeys(("m_ptr", "v_ptr"), moments)
    kinds["chunks_ptr"] = "*i32"
    dtypes = {"bf16": tl.bfloat16, "fp32": tl.float32}
    sides = {"DTYPE": dtypes[dtype], "GRADIENT": dtypes[gradient or dtype]}
    constants = sides | {"STREAM": STREAM, "ROWS": ROWS, "BLOCK": BLOCK} | constants
    signature = {p: kinds.get(p, "*fp32") for p in kernel.arg_names if p not in constants}
    vectors = bool(constants.get("ALIGNED"))
    return Specimen(name, kernel, dtype, signature, constants, WARPS, vector_load=vectors, vector_store=vectors)


AOT_SPECIMENS = [
    *(_specimen("adamw_8bit", adamw_8bit_kernel, dtype, "*u8", {"ALIGNED": True}) for dtype in ("bf16", "fp32")),
    *(_specimen("adamw_fp32", adamw_fp32_kernel, dtype, "*fp32", {}) for dtype in ("bf16", "fp32")),
    _specimen("adamw_8bit_accumulated", adamw_8bit_kernel, "bf16", "*u8", {"ALIGNED": True}, gradient="fp32"),
    Specimen(
        "begin_step", begin_step_kernel, "fp32",
        {"hyper_ptr": "*fp64", "step_ptr": "*i64", "found_inf_ptr": "*fp32", "factors_ptr": "*fp32", "G": "i32"},
        {"BLOCK_G": 2}, 1, vector_load=False, vector_store=False,
    ),
]  # fmt: skip
