"""The walk over scheduled HLO, on small programs whose costs can be counted by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easy_jax.ahead_of_time import chips, cost, hlo, measure
from easy_jax.ahead_of_time.measure import largest_batch
from easy_jax.config import ConfigError

V5E = chips.parse_topology("v5e:4x4")
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"3000"}}'
MS2 = 3000 / 1.5e9  # seconds of the 3,000 cycles
DOT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def _cost(text):
    return cost.cost_of(text, V5E)


def _loop(trips, init="zero", known=False, body=""):
    """A program that runs one product of 2 * 4 * 8 * 8 operations `trips` times."""
    config = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if known else ""
    return f"""HloModule test, is_scheduled=true

%body (c: (s32[], bf16[4,8], bf16[8,8])) -> (s32[], bf16[4,8], bf16[8,8]) {{
  %c = (s32[], bf16[4,8]{{1,0}}, bf16[8,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = bf16[4,8]{{1,0}} get-tuple-element(%c), index=1
  %w = bf16[8,8]{{1,0}} get-tuple-element(%c), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = bf16[4,8]{{1,0}} dot(%x, %w), {DOT}, {CYCLES}
{body}  ROOT %t = (s32[], bf16[4,8]{{1,0}}, bf16[8,8]{{1,0}}) tuple(%next, %y, %w)
}}

%condition (c.1: (s32[], bf16[4,8], bf16[8,8])) -> pred[] {{
  %c.1 = (s32[], bf16[4,8]{{1,0}}, bf16[8,8]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %limit = s32[] constant({trips})
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}}

ENTRY %main (x.1: bf16[4,8], w.1: bf16[8,8], n: s32[]) -> bf16[4,8] {{
  %x.1 = bf16[4,8]{{1,0}} parameter(0)
  %w.1 = bf16[8,8]{{1,0}} parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,8]{{1,0}}, bf16[8,8]{{1,0}}) tuple(%{init}, %x.1, %w.1)
  %loop = (s32[], bf16[4,8], bf16[8,8]) while(%start), condition=%condition, body=%body{config}
  ROOT %result = bf16[4,8]{{1,0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(("known", "init"), [(False, "zero"), (True, "n")])
def test_a_loop_counts_as_often_as_it_runs(known, init):
    result = _cost(_loop(7, init=init, known=known))
    assert result.flops == 7 * 2 * 4 * 8 * 8
    assert result.seconds == pytest.approx(7 * MS2)
    assert not result.unknown_loops


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    result = _cost(_loop(7, init="n"))
    assert result.flops == 2 * 4 * 8 * 8
    assert result.unknown_loops == {"loop": 1}


def test_products_inside_fusions_count_once():
    text = f"""
%inner (a: bf16[4,8], b: bf16[8,2]) -> bf16[4,2] {{
  %a = bf16[4,8]{{1,0}} parameter(0)
  %b = bf16[8,2]{{1,0}} parameter(1)
  ROOT %d = bf16[4,2]{{1,0}} dot(%a, %b), {DOT}
}}

%outer (a.1: bf16[4,8], b.1: bf16[8,2]) -> bf16[4,2] {{
  %a.1 = bf16[4,8]{{1,0}} parameter(0)
  %b.1 = bf16[8,2]{{1,0}} parameter(1)
  %f = bf16[4,2]{{1,0}} fusion(%a.1, %b.1), kind=kOutput, calls=%inner
  ROOT %n = bf16[4,2]{{1,0}} negate(%f)
}}

ENTRY %main (a.2: bf16[4,8], b.2: bf16[8,2]) -> bf16[4,2] {{
  %a.2 = bf16[4,8]{{1,0}} parameter(0)
  %b.2 = bf16[8,2]{{1,0:T(8,128)(2,1)S(1)}} parameter(1)
  ROOT %f.2 = bf16[4,2]{{1,0}} fusion(%a.2, %b.2), kind=kOutput, calls=%outer, {CYCLES}
}}
"""
    result = _cost(text)
    assert result.flops == 2 * 4 * 8 * 2
    assert result.seconds == pytest.approx(MS2)
    assert result.hbm_bytes == 2 * (4 * 8 + 4 * 2)  # %b.2 is on the chip already


def test_a_slice_of_a_stack_is_read_and_written_in_place():
    text = """
%update (s: f32[9,100], u: f32[100], i: s32[]) -> f32[9,100] {
  %s = f32[9,100]{1,0} parameter(0)
  %u = f32[100]{0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %z = s32[] constant(0)
  %r = f32[1,100]{1,0} reshape(%u)
  ROOT %w = f32[9,100]{1,0} dynamic-update-slice(%s, %r, %i, %z)
}

ENTRY %main (s.1: f32[9,100], u.1: f32[100], i.1: s32[]) -> f32[9,100] {
  %s.1 = f32[9,100]{1,0} parameter(0)
  %u.1 = f32[100]{0} parameter(1)
  %i.1 = s32[]{:S(6)} parameter(2)
  ROOT %f = f32[9,100]{1,0} fusion(%s.1, %u.1, %i.1), kind=kLoop, calls=%update
}
"""
    assert _cost(text).hbm_bytes == 2 * 4 * 100


@pytest.mark.parametrize(
    ("labels", "lhs", "rhs", "out", "window", "flops"),
    [
        ("bf_io->bf", "4,8", "8,2", "4,2", "", 2 * 4 * 8 * 2),
        # Three products of one batch axis, written as a convolution, as TPU programs do.
        (
            "0bf_0io->0bf",
            "3,4,8",
            "3,8,2",
            "3,4,2",
            ", window={size=3 stride=2 pad=2_2 lhs_dilate=3 rhs_reversal=1}",
            2 * 3 * 4 * 8 * 2,
        ),
        # A convolution over five places with a window of three and padding: 13 pairs in range.
        ("b0f_0io->b0f", "1,5,2", "3,2,7", "1,5,7", ", window={size=3 pad=1_1}", 2 * 13 * 2 * 7),
    ],
)
def test_convolutions_count_the_products_in_range(labels, lhs, rhs, out, window, flops):
    text = f"""
ENTRY %main (a: bf16[{lhs}], b: bf16[{rhs}]) -> bf16[{out}] {{
  %a = bf16[{lhs}] parameter(0)
  %b = bf16[{rhs}] parameter(1)
  ROOT %c = bf16[{out}] convolution(%a, %b), dim_labels={labels}{window}
}}
"""
    assert _cost(text).flops == flops


def test_an_asynchronous_slice_moves_the_slice_once_and_takes_no_time():
    text = """
ENTRY %main (a: f32[4,100]) -> f32[1,100] {
  %a = f32[4,100]{1,0:T(8,128)} parameter(0)
  %s = ((f32[4,100]{1,0:T(8,128)}), f32[1,100]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:100]}
  ROOT %d = f32[1,100]{1,0:T(8,128)S(1)} slice-done(%s)
}
"""  # noqa: E501
    result = _cost(text)
    assert result.hbm_bytes == 4 * 100  # read; what is written is on the chip
    assert result.seconds == 0


def test_the_gradient_of_a_maximum_over_windows_takes_as_long_as_its_bytes():
    """The compiler tells no cycles of it."""
    text = """
ENTRY %main (x: f32[4,100], g: f32[4,50], z: f32[]) -> f32[4,100] {
  %x = f32[4,100]{1,0} parameter(0)
  %g = f32[4,50]{1,0} parameter(1)
  %z = f32[] parameter(2)
  ROOT %s = f32[4,100]{1,0} select-and-scatter(%x, %g, %z), window={size=1x2 stride=1x2}
}
"""
    result = _cost(text)
    assert result.hbm_bytes == 4 * (400 + 200 + 1 + 400)
    assert result.seconds == pytest.approx(result.hbm_bytes / V5E.chip.hbm_bandwidth)


def test_real_programs_are_read_and_counted():
    """What XLA's CPU compiler writes: eight layers in a scan."""

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    compiled = jax.jit(layers).lower(np.ones((16, 32), "f"), np.ones((8, 32, 32), "f")).compile()
    result = _cost(compiled.as_text())
    assert result.flops == 8 * 2 * 16 * 32 * 32
    assert not result.unknown_loops


GROUP = "channel_id=1, replica_groups=[1,16]<=[16]"
SYNC = """
ENTRY %main (x: bf16[1000]) -> bf16[16000] {{
  %x = bf16[1000]{{0}} parameter(0)
  ROOT %g = bf16[{out}]{{0}} {kind}(%x), {group}
}}
"""


@pytest.mark.parametrize(
    ("kind", "group", "sent"),
    [
        ("all-gather", GROUP, 15 * 2000),
        ("all-gather", "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}", 3 * 2000),
        ("all-reduce", GROUP, 2 * 2000 * 15 / 16),
        ("reduce-scatter", GROUP, 2000 * 15 / 16),
        ("all-to-all", "replica_groups=mesh['a'=4,'b'=4] {'b'}", 2000 * 3 / 4),
        ("all-gather", "replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}", 14000),
        ("all-reduce", "replica_groups={}", 2 * 2000 * 15 / 16),
        ("collective-permute", "channel_id=1, source_target_pairs={{0,1},{1,0}}", 2000),
    ],
)
def test_bytes_of_a_collective_are_those_that_rings_send(kind, group, sent):
    result = _cost(SYNC.format(kind=kind, group=group, out=1000))
    assert result.collectives == {kind: 1}
    assert result.collective_bytes[kind] == pytest.approx(sent)
    size = cost.group_size(group, V5E.num_chips)
    assert result.unhidden_seconds == pytest.approx(sent / V5E.bandwidth(size))


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(hlo.HloError, match="replica groups in a notation that is not known: @"):
        _cost(SYNC.format(kind="all-gather", group="replica_groups=@mesh", out=1000))


def test_an_asynchronous_collective_counts_once_and_hides_behind_the_work_between():
    """Started, carried on in a fusion beside a product, and ended: one channel, one transfer."""

    def program(size):
        return f"""
%start (p: bf16[{size}]) -> (bf16[{size}], bf16[{16 * size}]) {{
  %p = bf16[{size}]{{0}} parameter(0)
  %g = bf16[{16 * size}]{{0}} all-gather(%p), {GROUP}
  ROOT %s = (bf16[{size}], bf16[{16 * size}]) custom-call(%g), custom_call_target="Start"
}}

%step (p.1: bf16[{size}], a: bf16[4,8], b: bf16[8,2]) -> bf16[4,2] {{
  %p.1 = bf16[{size}]{{0}} parameter(0)
  %a = bf16[4,8]{{1,0}} parameter(1)
  %b = bf16[8,2]{{1,0}} parameter(2)
  %g.1 = bf16[{16 * size}]{{0}} all-gather(%p.1), {GROUP}
  ROOT %d = bf16[4,2]{{1,0}} dot(%a, %b), {DOT}
}}

%done (p.2: bf16[{size}]) -> bf16[{16 * size}] {{
  %p.2 = bf16[{size}]{{0}} parameter(0)
  ROOT %g.2 = bf16[{16 * size}]{{0}} all-gather(%p.2), {GROUP}
}}

ENTRY %main (x: bf16[{size}], a.1: bf16[4,8], b.1: bf16[8,2]) -> bf16[{16 * size}] {{
  %x = bf16[{size}]{{0}} parameter(0)
  %a.1 = bf16[4,8]{{1,0}} parameter(1)
  %b.1 = bf16[8,2]{{1,0}} parameter(2)
  %f1 = (bf16[{size}], bf16[{16 * size}]) fusion(%x), kind=kCustom, calls=%start
  %f2 = bf16[4,2]{{1,0}} fusion(%x, %a.1, %b.1), kind=kOutput, calls=%step, {CYCLES}
  ROOT %f3 = bf16[{16 * size}]{{0}} fusion(%x), kind=kCustom, calls=%done
}}
"""

    short, long = _cost(program(1000)), _cost(program(1_000_000))
    assert short.collectives == long.collectives == {"all-gather": 1}
    assert short.collective_bytes["all-gather"] == 15 * 2000
    assert short.unhidden_seconds == pytest.approx(0.0, abs=1e-12)
    transfer = 15 * 2_000_000 / V5E.bandwidth(16)
    assert long.unhidden_seconds == pytest.approx(transfer - MS2)


def test_a_start_and_a_done_are_one_transfer():
    text = f"""
ENTRY %main (x: bf16[1000], a: bf16[4,8], b: bf16[8,2]) -> bf16[16000] {{
  %x = bf16[1000]{{0}} parameter(0)
  %a = bf16[4,8]{{1,0}} parameter(1)
  %b = bf16[8,2]{{1,0}} parameter(2)
  %s = (bf16[1000], bf16[16000]) all-gather-start(%x), {GROUP}
  %d = bf16[4,2]{{1,0}} dot(%a, %b), {DOT}, {CYCLES}
  ROOT %g = bf16[16000]{{0}} all-gather-done(%s)
}}
"""
    result = _cost(text)
    assert result.collectives == {"all-gather": 1}
    assert result.collective_bytes == {"all-gather": 15 * 2000}
    assert result.unhidden_seconds == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "config", "products"),
    [
        ("splash_mha_fwd_segmented", "", 2),
        ("splash_mha_dq_segmented", "", 3),
        ("splash_mha_dkv_segmented", "", 4),
        ("splash_mha_dkv_segmented", r", \"use_fused_bwd_kernel\": true", 5),
    ],
)
def test_attention_kernels_count_by_formula_at_half_of_the_peak(name, config, products):
    text = f"""
ENTRY %main (q: bf16[2,8,1024,256], k: bf16[2,4,1024,256]) -> bf16[2,8,1024,256] {{
  %q = bf16[2,8,1024,256]{{3,2,1,0}} parameter(0)
  %k = bf16[2,4,1024,256]{{3,2,1,0}} parameter(1)
  ROOT %c = bf16[2,8,1024,256]{{3,2,1,0}} custom-call(%q, %k), custom_call_target="tpu_custom_call", metadata={{op_name="{name}/{{\\"block_q\\": 512{config}}}"}}
}}
"""  # noqa: E501
    result = _cost(text)
    # Blocks of 512: three of four are not masked away.
    assert result.flops == products * 2 * 2 * 8 * 1024 * 1024 * 256 * 3 / 4
    assert result.kernel_seconds == pytest.approx(result.flops / (V5E.chip.peak_flops / 2))
    assert sum(result.kernels.values()) == 1


def test_a_text_without_a_program_is_refused():
    with pytest.raises(hlo.HloError, match="no ENTRY computation"):
        hlo.parse("nothing")


@pytest.mark.parametrize("name", ["v5e", "v3:4x4", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "4x4"])
def test_a_topology_that_is_not_known_is_named(name):
    with pytest.raises(ConfigError, match=f"topology is '{name}'"):
        chips.parse_topology(name)


def test_bandwidth_follows_the_torus():
    assert V5E.bandwidth(16) == 2 * 45e9  # two lines
    assert chips.parse_topology("v5e:16x16").bandwidth(256) == 4 * 45e9  # two rings
    assert chips.parse_topology("v5e:16x16").bandwidth(16) == 2 * 45e9  # one ring
    assert V5E.accelerator_type == "v5litepod-16"
    assert chips.parse_topology("v5p:4x4x4").accelerator_type == "v5p-128"


def test_the_largest_batch_takes_few_tries():
    tried = []
    assert largest_batch(lambda rows: tried.append(rows) or rows <= 37) == 37
    assert len(tried) <= 12
    assert largest_batch(lambda rows: False) == 0
    assert largest_batch(lambda rows: True, most=100) == 100


def test_what_is_measured_can_be_printed_and_stored():
    """A program of 8 GiB in all; 2 of 3 GiB of temporaries are activations."""
    gib = chips.GIB
    memory = measure.Memory(gib, 2 * gib, gib, 0, 2 * gib, 3 * gib, gib, 0)
    result = measure.Measured(
        "train",
        64,
        16,
        memory.total,
        V5E.chip.hbm_bytes,
        5.0,
        memory,
        _cost(_loop(7)),
        model_flops=1e9,
        peak_flops=V5E.chip.peak_flops,
    )
    assert memory.total == 8 * gib and result.fits
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["cost"]["seconds"] == pytest.approx(7 * MS2)
    assert stored["utilisation"] == pytest.approx(1e9 / 197e12 / (7 * MS2))
    table = measure.table([result], {"train": 9})
    assert "yes: needs 8.00 of 15.75 GiB" in table and "9 rows a chip" in table
    assert "2.00 GiB" in table.splitlines()[9]
    too_much = dataclasses.replace(result, memory=None, cost=None, needs=17 * gib)
    assert not too_much.fits
    assert "no: needs 17.00 of 15.75 GiB" in measure.table([too_much])
    assert json.loads(json.dumps(too_much.to_json()))["fits"] is False
