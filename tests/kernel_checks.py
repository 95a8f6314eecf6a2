"""The checks of ``test_kernels.py``, on any device: a kernel and its reference must agree.

``device`` and ``dtype`` are the kernel's; tolerances are those of ``dtype``, where there is
arithmetic at all, and selections must be equal exactly.
"""

from types import SimpleNamespace

import torch
from paged_world import World, same, with_ties

from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.attention import LazyAttentionImpl
from lazyllm_vllm.kernels import (
    attention,
    gather,
    rank,
    rotary,
    rows,
    score,
    select_decode,
    select_prefill,
)
from lazyllm_vllm.kernels.state import PrefillMove, Rows
from lazyllm_vllm.kernels.top_k import BINS

LONG = 3
ROTARY_SHAPES = ((9, 3, 64), (32, 8, 128), (32, 32, 128), (6, 1, 96))  # heads, KV heads, size
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def _world(seed, stage, strict=False, decoded=(3, 1, 9, 40), share=4, **kwargs) -> World:
    prompts = [37, 100, 261, 5] if seed % 2 == 0 else [300, 16, 64, 129]
    if seed == LONG:
        prompts = [1500, 700, 2100, 40]  # several tiles, whatever the kernel's tile
    return World(
        prompts=prompts, decoded=list(decoded), stage=stage, num_stages=3,
        block_size=16, kv_heads=2, group=3 if seed % 2 else 4, head_dim=64 if seed % 2 else 48,
        share=share, strict=strict, seed=seed, **kwargs,
    )  # fmt: skip


def _close(a, b, dtype, atol=None):
    tolerance = TOLERANCE[dtype]
    atol = tolerance if atol is None else atol
    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=atol)


def _attention_inputs(w: World):
    """Requests 0, 2 and 3 revive tokens, 1 is padding."""
    n, heads = len(w.prompts), w.kv_heads * w.group
    num_rows = n + n * w.share
    present = [len(p) for p in w.present]
    key_len = torch.tensor([c + d for c, d in zip(present, w.decoded)], dtype=torch.int32)
    if w.stage == 0:
        key_len = torch.tensor([p + d for p, d in zip(w.prompts, w.decoded)], dtype=torch.int32)
    key_len[1] = 0
    revived = torch.tensor([min(2, present[0]), 0, 3, min(1, present[3])], dtype=torch.int32)
    position = torch.zeros(num_rows, dtype=torch.int64)
    for i in range(n):
        position[i] = w.prompts[i] + w.decoded[i] - 1
        for nth in range(int(revived[i])):
            if nth < present[i]:
                position[n + i * w.share + nth] = w.present[i][nth]
    d = w.device
    return {
        "q": w.rand(num_rows, heads, w.head_dim),
        "kv_cache": w.kv_cache(),
        "block_table": w.position_table if w.stage == 0 else w.block_table,
        "position_table": w.position_table,
        "key_len": key_len.to(d),
        "num_revived": revived.to(d),
        "share": torch.tensor([w.share], dtype=torch.int32, device=d),
        "row_position": position.to(d),
        "slot_position": w.slot_position.to(d),
        "selected": w.selected.to(d),
        "num_prompt": torch.tensor(w.prompts, dtype=torch.int32, device=d),
        "num_decodes": n,
        "max_revived": w.share if w.stage else 0,
        "scale": w.head_dim**-0.5,
        "stage": w.stage,
        "strict": w.strict,
    }


def check_attention(seed, stage, strict, device="cpu", dtype=torch.float32):
    w = _world(seed, stage, strict, device=device, dtype=dtype)
    inputs = _attention_inputs(w)
    results = []
    for run in (attention.paged_attention_triton, attention.paged_attention_reference):
        out = torch.full_like(inputs["q"], 9e9)
        lse = torch.full((len(w.prompts), inputs["q"].shape[1]), 9e9, device=device)
        run(out, lse, **inputs)
        lse[1] = 0  # padding has none
        results.append((out, lse))
    _close(results[0][0], results[1][0], dtype)
    _close(results[0][1], results[1][1], dtype)
    assert (results[0][0][1] == 0).all(), "rows of no request are zeros"


def check_strict_attention_masks(device="cpu"):
    """What strict leaves out has no influence, what it keeps has."""
    w = _world(0, 1, strict=True, device=device)
    inputs = _attention_inputs(w)
    outputs = []
    for touched in (None, 0, 1):  # nothing; an unselected key; a selected one
        kv = inputs["kv_cache"].clone()
        if touched is not None:
            depth = w.selected[w.homes(2)][w.present[2]]
            j = int((depth == touched).nonzero()[0, 0])
            block = int(w.block_table[2][j // w.block_size])
            kv[block, :, j % w.block_size] += 5.0
        out = torch.zeros_like(inputs["q"])
        lse = torch.zeros(4, inputs["q"].shape[1], device=device)
        attention.paged_attention_triton(out, lse, **{**inputs, "kv_cache": kv})
        outputs.append(out[2])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def check_prefill_attention(seed, device="cpu", dtype=torch.float32):
    """Each prompt by itself, and the last rows' log-denominators that scoring starts from."""
    random = torch.Generator().manual_seed(seed)
    lens, heads, kv_heads, head_dim = [3, 130, 64, 517], 8, 2, 64
    total = sum(lens)
    # As the model gives them: views into one projection.
    qkv = torch.randn(total, (heads + 2 * kv_heads) * head_dim, generator=random).to(device, dtype)
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    q, k, v = (x.view(total, -1, head_dim) for x in (q, k, v))
    starts = torch.tensor([0, *lens], device=device).cumsum(0).int()
    step = SimpleNamespace(
        prefill_starts=[None, starts], max_prefill_rows=[None, max(lens)],
        schedule=SimpleNamespace(config=SimpleNamespace(score_window=4)),
    )  # fmt: skip
    impl = SimpleNamespace(
        scale=head_dim**-0.5, fa_version=fa_utils.get_flash_attn_version(head_size=head_dim)
    )
    out = torch.full((total, heads, head_dim), 9e9, device=device, dtype=dtype)
    lse = LazyAttentionImpl._prefill(impl, q, k, v, out, step, 1, True)
    for i, n in enumerate(lens):
        mine = slice(int(starts[i]), int(starts[i]) + n)
        keys, values = (x[mine].double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        logits = torch.einsum("ihd,jhd->hij", q[mine].double(), keys) * impl.scale
        later = torch.ones(n, n, device=device).triu(1).bool()
        logits = logits.masked_fill(later, float("-inf"))
        expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), values)
        _close(out[mine], expected, dtype)
        for back in range(min(4, n)):
            _close(lse[back, i], logits[:, -1 - back].logsumexp(-1), dtype)


def check_score(seed, stage, window, peak, device="cpu", dtype=torch.float32):
    """Of requests 1 to 3, one is not to be scored."""
    w = _world(seed, stage, device=device, dtype=dtype)
    inputs = _attention_inputs(w)
    query_row = torch.tensor([2, 0, 17, 1], dtype=torch.int32, device=device)
    lse = torch.randn(window, 5, inputs["q"].shape[1], generator=w.random).to(device) + 6
    active = torch.tensor([1, 1, 1, 0], dtype=torch.int32, device=device)
    floor = 0.5 * peak * (torch.arange(len(w.level), device=device) % 3 == 0)
    results = []
    for run in (score.score_tokens_triton, score.score_tokens_reference):
        token_score = torch.full((len(w.level),), -9.0, device=device)
        for accumulates in (False, True) if peak else (False,):
            if accumulates:
                token_score = torch.where(token_score > 0, token_score.maximum(floor), -9.0)
            run(
                token_score, inputs["q"], query_row, lse, inputs["kv_cache"],
                inputs["block_table"], w.position_table, inputs["key_len"], inputs["num_prompt"],
                active, inputs["slot_position"], 1, 3, inputs["scale"], stage, peak, accumulates,
            )  # fmt: skip
        results.append(token_score)
    _close(*results, dtype, atol=0)  # scores are small and their order is what counts
    home = w.homes(2)
    if stage:
        home = home[w.present[2]]
    assert (results[0].cpu()[home] > 0).all(), "every prompt token with keys is scored"
    if peak:
        assert (results[0][home] >= floor[home]).all(), "a higher score stays"
    for other in (0, 3):
        assert (results[0].cpu()[w.homes(other)] == -9).all(), "others are passed over"


def _kept(w: World, share: float) -> list[int]:
    return [max(1, int(p * share)) for p in w.prompts]


def check_rank(seed, stage, pool, strict, device="cpu"):
    w = with_ties(_world(seed, stage, device=device))
    results = []
    for run in (rank.rank_tokens_triton, rank.rank_tokens_reference):
        s = w.selection(_kept(w, 0.5), 0)
        run(s, 1, 3, stage, 2, strict, pool, 2, 7)
        results.append(s)
    for i in (1, 2, 3):
        if not results[0].is_pruned[i]:
            continue
        key = results[0].token_key[w.homes(i)].cpu()
        absent = w.level[w.homes(i)] == stage
        for first, listed in ((0, key >= 0), (BINS, (key >= 0) & absent)):
            digits = (key[listed] >> 20).long().bincount(minlength=2048)
            assert torch.equal(results[0].histogram[i, first : first + 2048].cpu(), digits.int())
    results[0].histogram.zero_()
    same(*results)
    assert (results[0].token_key.cpu()[w.homes(0)] == -99).all(), "request 0 was not asked for"


def _forget_search(s):
    """Drop what only the kernel keeps between its parts; the histogram must be clean by itself."""
    s.found.zero_()
    s.counts.zero_()


def check_prefill_selection(seed, stage, ties=True, device="cpu"):
    """Requests 0 (a decode, left alone), 1 and 2 (pruned), 3 (kept whole)."""
    w = _world(seed, stage, decoded=(5, 0, 0, 0), device=device)
    w = with_ties(w) if ties else w
    before = []
    for i in (1, 2, 3):
        level = w.level[w.homes(i)]
        before.append((level >= stage if stage > 1 else level > 0).nonzero()[:, 0])
    before[2] = torch.arange(w.prompts[3])
    kept = [max(8, len(b) // 3) if len(b) > 8 else len(b) for b in before[:2]] + [w.prompts[3]]
    base, dst_base = 1, 1 + 6
    start = [0, *torch.tensor([len(b) for b in before]).cumsum(0).tolist()]
    dst_start = [0, *torch.tensor(kept).cumsum(0).tolist()]
    results = []
    for run, rank_tokens in (
        (select_prefill.select_prefill_triton, rank.rank_tokens_triton),
        (select_prefill.select_prefill_reference, rank.rank_tokens_reference),
    ):
        s = w.selection([1, *kept[:2], w.prompts[3]], 0)
        s.active[stage] = torch.tensor([0, *(int(k < len(b)) for k, b in zip(kept, before))])
        rank_tokens(s, 1, 3, stage, 1, False, 3, 1, 2)
        out = w.rows(dst_base + dst_start[-1])
        ints = {"dtype": torch.int32, "device": device}
        move = PrefillMove(
            start=torch.tensor(start, **ints), dst_start=torch.tensor(dst_start, **ints),
            base=base, dst_base=dst_base,
            position=torch.cat([torch.zeros(1, dtype=torch.int64), *before]).to(device),
            dst_row=torch.full((base + start[-1],), -99, **ints),
            request=torch.full((base + start[-1],), -99, **ints),
        )  # fmt: skip
        run(s, out, move, 1, stage, True)
        _forget_search(s)
        results.append((s, out, move))
    for mine, theirs in zip(*results):
        same(mine, theirs)
    _, out, move = results[0]
    positions = out.position[dst_base:].cpu()
    for nth, b in enumerate(before):
        mine = positions[dst_start[nth] : dst_start[nth + 1]]
        assert (mine.diff() > 0).all() and set(mine.tolist()) <= set(b.tolist())
    assert (move.dst_row[base:] >= -1).all() and (move.dst_row[base:] >= 0).sum() == sum(kept)


def check_decode_selection(seed, stage, strict, share, ties=True, device="cpu"):
    w = _world(seed, stage, share=share, device=device)
    w = with_ties(w) if ties else w
    n = len(w.prompts)
    num_rows = n + n * share
    kept = [*_kept(w, 0.6)[:3], w.prompts[3]]  # the last is not pruned
    results = []
    for run, rank_tokens in (
        (select_decode.select_decode_triton, rank.rank_tokens_triton),
        (select_decode.select_decode_reference, rank.rank_tokens_reference),
    ):
        s = w.selection(kept, room=6)
        s.active[:, 1] = 0
        if not strict:
            s.active[:] *= s.limit > 0
        rank_tokens(s, 0, n, stage, 2, strict, 3, 1, 2)
        out = w.rows(num_rows)
        for revived in (out.num_revived, out.key_len, out.slot[:n]):
            revived.copy_(
                torch.tensor([0, 0, 0, 0] if revived is out.num_revived else [40, 7, 90, 3])
            )
        shares = torch.tensor([share], dtype=torch.int32, device=device)
        run(s, out, shares, n, stage, w.num_stages, 2, strict)
        _forget_search(s)
        results.append((s, out))
    for mine, theirs in zip(*results):
        same(mine, theirs)
    _, out = results[0]
    assert (out.num_revived <= min(share, 6)).all() and out.num_revived[[1, 3]].sum() == 0
    for i in (0, 2):
        mine = slice(n + i * share, n + i * share + int(out.num_revived[i]))
        revived = out.position[mine].cpu()
        assert (w.level[w.homes(i)][revived] == stage).all(), "only tokens without keys here"
        assert len(set(revived.tolist())) == len(revived)
    if share and seed != 1:
        assert out.num_revived.sum() > 0


def check_begin_step(seed, share, always, num_decodes, device="cpu"):
    """Requests that decode, one of them padding, then requests that are prefilled."""
    w = _world(seed, 1, share=max(share, 1), device=device)
    n, stages = len(w.prompts), w.num_stages
    revive_rows = num_decodes * share + 1 if share else 0
    positions = torch.tensor([p + d for p, d in zip(w.prompts, w.decoded)], device=device)
    results = []
    for run in (rows.begin_step_triton, rows.begin_step_reference):
        s = w.selection(_kept(w, 0.5), 3)
        index = s.req_index.long()
        s.table[index[0], 1 + stages :] += torch.arange(2 * stages, device=device).int() % 2
        s.table[index[2], 1 + stages : 1 + 2 * stages] = 0  # no room left
        s.table[index[3], 1 : 1 + stages] = s.table[index[3], 0]  # kept whole
        s.table[index, 1] = s.num_prompt
        s.req_index[1] = -1
        for poisoned in (s.num_prompt, s.is_pruned, s.active, s.limit):
            poisoned.fill_(-99)
        all_rows = Rows(
            *(torch.stack([x] * stages) for x in vars(w.rows(n + revive_rows)).values())
        )
        all_rows.request.fill_(-99)
        shares = torch.tensor([share], dtype=torch.int32, device=device)
        run(s, all_rows, positions, shares, num_decodes, n, revive_rows, always, stages)
        results.append((s, all_rows))
    for mine, theirs in zip(*results):
        for name in mine.__dataclass_fields__:
            a, b = getattr(mine, name), getattr(theirs, name)
            if name == "slot":  # padding has none
                a[:, 1] = b[:, 1] = 0
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b), name
    s, all_rows = results[0]
    assert s.num_prompt.tolist() == [w.prompts[0], 0, w.prompts[2], w.prompts[3]]
    assert s.is_pruned.tolist() == [1, 0, 1, 0]
    if num_decodes == n:
        assert all_rows.key_len[:, 1].tolist() == [0] * stages
        assert (s.active[1:, 2] == int(always)).all(), "without room only marking selects"
        assert (s.active[1:, 0] == int(always or share > 0)).all()
        assert (all_rows.request[1:, n : n + revive_rows] == -1).all()
    else:
        assert s.active[1:, 2].tolist() == [1, 0], "a prefill selects where it keeps less"


def check_place_and_write(seed, device="cpu", dtype=torch.float32):
    w = _world(seed, 1, device=device, dtype=dtype)
    n, num_rows = len(w.prompts), 61
    out = w.rows(num_rows + 5)
    out.request[:num_rows] = torch.randint(-1, n, (num_rows,), generator=w.random).int()
    # Each row a slot of its own.
    out.slot[:num_rows] = torch.arange(num_rows).remainder(w.width * w.block_size).int()
    out.position[:] = torch.randint(0, 9999, (num_rows + 5,), generator=w.random)
    placed = []
    for run in (rows.place_rows_triton, rows.place_rows_reference):
        mapping = torch.full((num_rows + 5,), -99, dtype=torch.int64, device=device)
        slot_position = w.slot_position.clone().to(device)
        run(mapping, slot_position, out, w.block_table, num_rows, w.block_size)
        placed.append((mapping, slot_position))
    assert all(torch.equal(a, b) for a, b in zip(*placed))
    mapping = placed[0][0]
    assert (mapping[num_rows:] == -99).all() and (mapping[:num_rows] == -1).any()

    kv = w.kv_cache()
    k, v = (w.rand(num_rows, w.kv_heads, w.head_dim) for _ in range(2))
    one = torch.ones(1, device=device)
    written = kv.clone()
    rows.write_kv(SimpleNamespace(_k_scale=one, _v_scale=one), written, k, v, mapping[:num_rows])
    expected = kv.clone()
    for row in range(num_rows):
        slot = int(mapping[row])
        if slot >= 0:
            at = expected[slot // w.block_size, :, slot % w.block_size]
            at[:, : w.head_dim], at[:, w.head_dim :] = k[row], v[row]
    assert torch.equal(written, expected) and not torch.equal(written, kv)


def check_rotate_and_write(seed, device="cpu", dtype=torch.float32):
    """``seed`` picks one of ``ROTARY_SHAPES``."""
    random = torch.Generator().manual_seed(seed)
    heads, kv_heads, head_dim = ROTARY_SHAPES[seed]
    num_rows, blocks, block_size = 13, 5, 16
    sizes = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    qkv = torch.randn(num_rows, sum(sizes), generator=random).to(device, dtype)
    # Another layer's pages lie between, and a slot's heads side by side.
    pages = torch.randn(blocks, 2, block_size, kv_heads, 2 * head_dim, generator=random)
    pages = pages.to(device, dtype)
    angle = 6.3 * torch.rand(99, head_dim // 2, generator=random)
    cos_sin = torch.cat([angle.cos(), angle.sin()], -1).to(device, dtype)
    # As the engine's buffers, longer than the rows.
    positions = torch.randint(99, (num_rows + 3,), generator=random).to(device)
    positions[num_rows:] = 10**9
    slots = torch.randperm(blocks * block_size, generator=random)[: num_rows + 3].to(device)
    slots[::4] = -1

    def split(x):
        return (part.view(num_rows, -1, head_dim) for part in x.split(sizes, -1))

    q, k, v = split(qkv)
    theirs = RotaryEmbedding.forward_static(
        positions[:num_rows], q.float(), k.float(), head_dim, head_dim, cos_sin.float(), True
    )
    for run in (rotary.rotate_and_write_triton, rotary.rotate_and_write_reference):
        rotated, written = qkv.clone(), pages.clone()
        mine = list(split(rotated))
        run(*mine, cos_sin, positions, slots, written[:, 1].transpose(1, 2))
        for a, b in zip(mine, theirs):
            _close(a, b, dtype)
        assert torch.equal(mine[2], v)
        expected = pages.clone()
        for row, slot in enumerate(slots[:num_rows].tolist()):
            if slot >= 0:
                at = expected[slot // block_size, 1, slot % block_size]
                at[:, :head_dim], at[:, head_dim:] = mine[1][row], v[row]
        assert torch.equal(written, expected) and not torch.equal(written, pages)


def check_aux_copies(has_aux, device="cpu", dtype=torch.float32):
    w = _world(0, 1, device=device, dtype=dtype)
    hidden_size, n = 40, len(w.prompts)
    lens = torch.tensor(w.prompts)
    request = torch.repeat_interleave(torch.arange(n), lens).int().to(device)
    position = torch.cat([torch.arange(p) for p in w.prompts]).to(device)
    num_rows = len(position)
    dst = torch.full((num_rows,), -1, dtype=torch.int32)
    kept = torch.randperm(num_rows, generator=w.random)[: num_rows // 3].sort().values
    dst[kept] = torch.arange(len(kept)).int()
    nothing = torch.zeros(0)
    move = PrefillMove(nothing, nothing, 0, 0, position, dst.to(device), request)
    hidden = w.rand(num_rows, hidden_size)
    empty = w.aux(hidden_size, pages=3, per_page=4)
    results = []
    for run in (gather.move_prefill_rows_triton, gather.move_prefill_rows_reference):
        aux = gather.AuxPages(**{**vars(empty), "buffer": empty.buffer.clone()})
        out = torch.full((len(kept), hidden_size), 9e9, device=device, dtype=dtype)
        run(out, hidden, move, 0, num_rows, aux if has_aux else None)
        results.append((out, aux.buffer))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.equal(results[0][0], hidden[kept.to(device)])
    if not has_aux:
        return

    # What was dropped comes back as it was; unused rows come back as zeros.
    aux = gather.AuxPages(**{**vars(empty), "buffer": results[0][1]})
    dropped = (dst < 0).nonzero()[:20, 0].to(device)
    out = w.rows(24)
    out.request[2:22] = request[dropped]
    out.position[2:22] = position[dropped]
    for load, store in (
        (gather.load_aux_triton, gather.store_aux_triton),
        (gather.load_aux_reference, gather.store_aux_reference),
    ):
        back = torch.full((24, hidden_size), 9e9, device=device, dtype=dtype)
        load(back, hidden, out, 2, 23, aux)
        assert torch.equal(back[2:22], hidden[dropped])
        assert torch.equal(back[:2], hidden[:2]), "the decodes' own"
        assert (back[22] == 0).all() and (back[23].float() > 8e9).all()
        stored = gather.AuxPages(**{**vars(aux), "buffer": torch.full_like(aux.buffer, 7)})
        store(back, out, 2, 20, stored)
        at = aux.addresses(out.request[2:22], out.position[2:22])
        assert torch.equal(
            stored.buffer[at[:, None] + torch.arange(hidden_size, device=device)], back[2:22]
        )
        assert int((stored.buffer != 7).sum()) <= 20 * hidden_size
