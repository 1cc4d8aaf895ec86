"""From counted steps to a verdict: arithmetic on plain numbers, no clock, no device.

A step's roof: its kernels run one after the other, so it is the sum of what linear layers take
(products, or reading the weights: whichever takes longer) and of what attention takes (products, or
reading the KV cache). What bound a run is where most of its time went: in steps that lacked
sequences (as far as full ones would have been faster), between steps, or else in full steps, by
their roof. A setting's gain is the part of the roof that it takes away; what a step takes above its
roof is left as it was, so that the gain promised is not that of a perfect engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from batchinfer.telemetry.tally import FULL_SHARE, Kind, Steps, Tokens
from batchinfer.verdict.overhead import Sized, step_overhead
from batchinfer.verdict.setup import Setup
from batchinfer.verdict.verdict import Bound, Lever, Verdict
from batchinfer.verdict.work import ModelWork

#: Where steps are too much alike to tell what they cost whatever they hold: those that reach less
#: of their roof are bound by that. On an H200 an 8B model's full steps reached 33 % to 61 %.
_LEAST_SHARE = 0.2
#: Measured where steps of 513 to 1,024 sequences got graphs: H200, an 8B model in 16 bits, warm.
_GRAPH_GAIN = 0.09
#: Products in fp8 reach this much less of their peak than those in 16 bits of theirs: of the roof
#: 39 % beside 56 % on the same rows (H200, 8B).
_FP8_REACH = 0.7
#: A gain below is not worth a setting.
_LEAST_GAIN = 0.03
#: Of a GPU that nobody else uses, as under `engine.gpu_memory_utilization: auto`.
_MOST_UTILIZATION = 0.9


@dataclass(frozen=True, slots=True)
class _Roof:
    """Seconds at the device's peaks, and what they are for."""

    by_compute: float = 0.0  # of kernels that products bind
    by_bandwidth: float = 0.0  # of those that bytes bind
    flops_s: float = 0.0  # all products
    bytes_s: float = 0.0  # all bytes

    @property
    def seconds(self) -> float:
        return self.by_compute + self.by_bandwidth

    def __add__(self, other: _Roof) -> _Roof:
        return _Roof(
            self.by_compute + other.by_compute,
            self.by_bandwidth + other.by_bandwidth,
            self.flops_s + other.flops_s,
            self.bytes_s + other.bytes_s,
        )


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Steps of about one size, with fractions where they were made up."""

    kind: Kind
    num_steps: float
    running: float
    tokens: float
    seconds: float

    def widened(self, factor: float) -> _Stretch:
        """The same work in fewer steps of more sequences."""
        return replace(self, num_steps=self.num_steps / max(1.0, factor))


@dataclass(frozen=True, slots=True)
class _Run:
    """What was run, on what, and how long it took."""

    stretches: Sequence[_Stretch]
    setup: Setup
    num_requests: int
    context: float  # mean of a computed token
    held: float  # mean tokens of a decoding sequence, that its KV cache holds
    seconds: float
    overhead_s: float | None = None  # of a step whatever it holds; None: not to be told

    def roof(self, stretch: _Stretch, work: ModelWork | None = None) -> _Roof:
        """Nothing where work or peaks are unknown. `work`: another one."""
        work, peaks = work or self.setup.work, self.setup.peaks
        if work is None or peaks is None:
            return _Roof()
        products, bytes_per_s = peaks.flops_per_s, peaks.bytes_per_s
        tokens = stretch.tokens
        num_logits = tokens if work.has_all_logits else stretch.running
        linear_s = tokens * work.token_flops / products[work.linear]
        linear_s += num_logits * work.logits_flops / products[work.attention]
        weights_s = stretch.num_steps * work.weights_bytes / bytes_per_s
        attention_s = tokens * self.context * work.context_flops / products[work.attention]
        num_read = min(stretch.running, tokens) * self.held
        kv_s = (num_read + tokens) * work.kv_bytes / bytes_per_s
        roof = _Roof(flops_s=linear_s + attention_s, bytes_s=weights_s + kv_s)
        for compute_s, bytes_s in ((linear_s, weights_s), (attention_s, kv_s)):
            if compute_s >= bytes_s:
                roof = replace(roof, by_compute=roof.by_compute + compute_s)
            else:
                roof = replace(roof, by_bandwidth=roof.by_bandwidth + bytes_s)
        return roof

    def room(self, kv_tokens: float) -> float:
        """Sequences that the KV cache holds at a time."""
        return kv_tokens / max(1.0, self.held)


def judge(
    steps: Sequence[Steps],
    tokens: Tokens,
    setup: Setup,
    *,
    tokens_per_s: float,
    host_s: float,
    stalled_s: float,
) -> Verdict | None:
    """None where no step was run.

    `tokens_per_s`: as the run tells it. `host_s`: between steps. `stalled_s`: waited for input or
    storage.
    """
    in_steps_s = sum(s.seconds for s in steps)
    if in_steps_s <= 0:
        return None
    run = _run_of(steps, tokens, _known(setup), in_steps_s + host_s + stalled_s)
    is_known = run.setup.work is not None and run.setup.peaks is not None
    roof = sum(map(run.roof, run.stretches), _Roof())
    lost = _lost(run)
    lost["host"] = host_s
    useful_s = in_steps_s - lost["tail"] - lost["KV room"] - lost["input"]
    lost["input"] += stalled_s
    bound: Bound = max(lost, key=lost.__getitem__)
    if useful_s >= lost[bound]:
        bound = _of_full_steps(run, roof, in_steps_s)
    num_steps = sum(s.num_steps for s in run.stretches)
    mean_held = sum(s.running for s in run.stretches) / num_steps * run.held
    tail_s = sum(s.seconds for s in run.stretches if s.kind == "tail")
    return Verdict(
        bound=bound,
        tokens_per_s=tokens_per_s,
        device=setup.device,
        peaks=run.setup.peaks.source if is_known and run.setup.peaks else None,
        share_of_roof=roof.seconds / run.seconds if is_known else None,
        compute=roof.flops_s / run.seconds if is_known else None,
        memory_bandwidth=roof.bytes_s / run.seconds if is_known else None,
        kv_room=min(1.0, mean_held / setup.kv_tokens) if setup.kv_tokens else None,
        host=host_s / run.seconds,
        waiting=stalled_s / run.seconds,
        tail=tail_s / run.seconds,
        lever=_best(run, _levers(run)),
    )


def _known(setup: Setup) -> Setup:
    """Without the work where a peak is missing that it needs. A card whose peaks are all known and
    that lacks a precision multiplies in its own 16 bits, once it has unpacked the weights.
    """
    work, peaks = setup.work, setup.peaks
    if work is None or peaks is None:
        return setup
    if work.linear not in peaks.flops_per_s and peaks.source == "table":
        work = replace(work, linear=work.attention)
    is_known = {work.linear, work.attention} <= peaks.flops_per_s.keys()
    return replace(setup, work=work if is_known else None)


def _run_of(steps: Sequence[Steps], tokens: Tokens, setup: Setup, seconds: float) -> _Run:
    """Where the engine does not say how many tokens a step computed, and in truth how many
    sequences it ran: all alike for each sequence, no more than the KV cache has room for.
    """
    decoded = max(1, tokens.decoded)
    context = (tokens.prompt_context + tokens.completion_context) / max(1, tokens.computed)
    held = tokens.completion_context / decoded if tokens.completion_context else context
    has_tokens = any(s.tokens for s in steps)
    room = setup.kv_tokens / max(1.0, held) if setup.kv_tokens and not has_tokens else float("inf")
    all_running = sum(min(s.running, room * s.num_steps) for s in steps)
    stretches = []
    for s in steps:
        if not s.num_steps:
            continue
        running = min(s.running, room * s.num_steps)
        is_short = s.kind == "full" and running < min(s.running, FULL_SHARE * _all(setup, s))
        stretches.append(
            _Stretch(
                kind="short" if is_short else s.kind,
                num_steps=s.num_steps,
                running=running,
                tokens=s.tokens if has_tokens else running * tokens.computed / max(1, all_running),
                seconds=s.seconds,
            )
        )
    run = _Run(stretches, setup, tokens.num_requests, context, held, seconds)
    sized = [Sized(s.num_steps, run.roof(s).seconds or s.tokens, s.seconds) for s in stretches]
    return replace(run, overhead_s=step_overhead(sized))


def _all(setup: Setup, steps: Steps) -> float:
    return setup.width * steps.num_steps


def _lost(run: _Run) -> dict[Bound, float]:
    """Seconds of steps with few sequences that full ones would have saved: of what each step costs
    whatever it holds, and of the roof, in proportion.
    """
    lost: dict[Bound, float] = {"tail": 0.0, "KV room": 0.0, "input": 0.0}
    names: dict[Kind, Bound] = {"tail": "tail", "short": "KV room", "starved": "input"}
    for stretch in run.stretches:
        if (name := names.get(stretch.kind)) is None or not stretch.running:
            continue
        factor = max(1.0, run.setup.width * stretch.num_steps / stretch.running)
        roof_s = run.roof(stretch).seconds
        full_s = run.roof(stretch.widened(factor)).seconds
        if run.overhead_s is not None:
            fixed_s = min(stretch.seconds, run.overhead_s * stretch.num_steps)
        else:  # what is above the roof may be that, or may grow with what a step holds
            fixed_s = 0.0 if name == "KV room" else max(0.0, stretch.seconds - roof_s)
        of_roof = 1 - full_s / roof_s if roof_s else 0.0
        lost[name] += fixed_s * (1 - 1 / factor) + (stretch.seconds - fixed_s) * of_roof
    return lost


def _of_full_steps(run: _Run, roof: _Roof, in_steps_s: float) -> Bound:
    if run.overhead_s is not None:
        num_steps = sum(stretch.num_steps for stretch in run.stretches)
        is_overhead = run.overhead_s * num_steps > in_steps_s / 2
    else:
        is_overhead = 0 < roof.seconds < _LEAST_SHARE * in_steps_s
    if is_overhead:
        return "step overhead"
    if not roof.seconds:
        return "unknown"
    return "compute" if roof.by_compute >= roof.by_bandwidth else "memory bandwidth"


def _best(run: _Run, levers: Iterator[tuple[Lever, float | None]]) -> Lever | None:
    """The one that saves most seconds; one whose gain is unknown is only offered for cause."""
    best, best_s = None, _LEAST_GAIN / (1 + _LEAST_GAIN) * run.seconds
    for lever, saved_s in levers:
        if saved_s is None:
            return lever
        if saved_s > best_s:
            gain = saved_s / max(1e-9, run.seconds - saved_s)
            best, best_s = replace(lever, expected_gain=gain), saved_s
    return best


def _levers(run: _Run) -> Iterator[tuple[Lever, float | None]]:
    """Settings that could be otherwise, with the seconds that they would save; None: not known."""
    setup, work = run.setup, run.setup.work
    if setup.is_eager:
        yield Lever("engine.options.enforce_eager", False, None, changes_tokens=False), None
    if setup.graph_width is not None and setup.graph_width < setup.width:
        beyond_s = sum(
            s.seconds for s in run.stretches if s.running > setup.graph_width * s.num_steps
        )
        yield (
            Lever(
                "engine.options.max_cudagraph_capture_size", setup.width, None, changes_tokens=False
            ),
            beyond_s * (1 - 1 / (1 + _GRAPH_GAIN)),
        )
    yield from _wider(run)
    if work is None or setup.peaks is None:
        return
    if setup.can_fp8_kv and work.kv_bytes:
        smaller = replace(work, kv_bytes=work.kv_bytes / 2)
        lever = Lever("model.kv_cache_dtype", "fp8", None, changes_tokens=True)
        yield lever, _saved(run, smaller, room_factor=2.0)
    has_fp8 = "fp8" in setup.peaks.flops_per_s
    if setup.can_fp8_weights and has_fp8 and work.linear == "16 bit":
        freed = work.token_flops / 2  # one byte of two for each number
        smaller = replace(
            work,
            linear="fp8",
            token_flops=work.token_flops / _FP8_REACH,
            weights_bytes=max(0.0, work.weights_bytes - freed),
        )
        room = 1.0
        if setup.kv_tokens and work.kv_bytes:
            room += freed / (setup.kv_tokens * work.kv_bytes)
        lever = Lever("model.quantization", "fp8", None, changes_tokens=True)
        yield lever, _saved(run, smaller, room_factor=room)
    yield from _more_memory(run, work)


def _saved(run: _Run, work: ModelWork, *, room_factor: float) -> float:
    """By another roof; steps that were short of room run more sequences."""
    saved_s = 0.0
    for stretch in run.stretches:
        after = stretch
        if stretch.kind == "short" and stretch.running:
            most = run.setup.width * stretch.num_steps / stretch.running
            after = stretch.widened(min(room_factor, most))
        saved_s += run.roof(stretch).seconds - run.roof(after, work).seconds
    return saved_s


def _more_memory(run: _Run, work: ModelWork) -> Iterator[tuple[Lever, float]]:
    setup = run.setup
    share, kv_tokens = setup.utilization, setup.kv_tokens
    if not share or not kv_tokens or not work.kv_bytes or share >= _MOST_UTILIZATION - 0.005:
        return
    used = kv_tokens * work.kv_bytes + work.weights_bytes
    factor = 1 + used * (_MOST_UTILIZATION / share - 1) / (kv_tokens * work.kv_bytes)
    lever = Lever("engine.gpu_memory_utilization", _MOST_UTILIZATION, None, changes_tokens=False)
    yield lever, _saved(run, work, room_factor=factor)


def _wider(run: _Run) -> Iterator[tuple[Lever, float]]:
    """Twice the sequences, as far as rows and KV cache go, in steps that had as many as may be."""
    setup = run.setup
    if setup.is_narrowed:
        return
    width = min(2.0 * setup.width, run.num_requests)
    if setup.kv_tokens:
        width = min(width, run.room(setup.kv_tokens))
    width = int(width) // 8 * 8
    if width < 1.1 * setup.width:
        return
    saved_s = 0.0
    for stretch in run.stretches:
        if stretch.kind != "full" or stretch.running < FULL_SHARE * setup.width * stretch.num_steps:
            continue
        after = stretch.widened(width / setup.width)
        roof = run.roof(stretch).seconds
        saved_s += roof - run.roof(after).seconds
        saved_s += (run.overhead_s or 0.0) * (stretch.num_steps - after.num_steps)
    yield Lever("engine.max_num_seqs", width, None, changes_tokens=False), saved_s
