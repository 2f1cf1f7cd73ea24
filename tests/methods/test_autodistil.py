"""Sub-networks are slices; relations do not know widths; the search finds the least loss."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.tiny import tiny_dit, tiny_dit_pipe, tiny_unet

from effuse.compress.search.autodistil import (
    BASE,
    KL,
    MSE,
    SMALL,
    TINY,
    Answer,
    AttentionRelationLoss,
    ElasticTransformer,
    Sandwich,
    Slice,
    SubSpace,
    choose,
    held_out_loss,
    read_of,
    relation,
)
from effuse.compress.search.dynas import LINAS
from effuse.compress.search.elastic import Cut, Size, family_of, kept_blocks, whole_of
from effuse.compress.units import macs
from effuse.core.training import fit

SPACE = SubSpace((2, 3), (16, 24), (2, 3), (1.5, 2.0))


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=50,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
    )


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=50,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def dit():
    return tiny_dit(num_layers=4, num_attention_heads=4, attention_head_dim=8)


def made(build):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return build().eval()


def call(model, rows=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    name = type(model).__name__
    if name == "ViTModel":
        return (torch.randn(rows, 3, 16, 16, generator=rng),), {}
    if name == "DiTTransformer2DModel":
        size = model.config.sample_size
        x = torch.randn(rows, model.config.in_channels, size, size, generator=rng)
        labels = torch.arange(rows) % 5
        return (x,), {"timestep": torch.full((rows,), 300), "class_labels": labels}
    return (torch.randint(3, 49, (rows, 7), generator=rng),), {}


@pytest.fixture(params=[bert, vit, clip, dit], ids=lambda f: f.__name__)
def model(request):
    return made(request.param)


def test_the_whole_is_the_teacher(model):
    whole = whole_of(model).size
    (args, kwargs) = call(model)
    with torch.no_grad():
        same = Cut(model, whole)(model, *args, **kwargs)[0]
        assert torch.equal(same, model(*args, **kwargs)[0])
    space = SubSpace((whole.depth,), (whole.hidden,), (whole.heads,), (whole.ratio,))
    student = ElasticTransformer.from_pretrained_dense(model, space)
    batch = {"call": call(model)}
    assert held_out_loss(student, whole, model, [batch], AttentionRelationLoss(4)) == 0


def test_a_slice_is_the_student_alone(model):
    student = ElasticTransformer.from_pretrained_dense(model, SPACE)
    for size in SPACE.sizes()[::5]:
        (args, kwargs), alone = call(model), student.extract(size)
        student.size = size
        with torch.no_grad():
            a, b = student(*args, **kwargs)[0], alone(*args, **kwargs)[0]
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        counted = sum(p.numel() for p in alone.parameters())
        assert student.parameters_at(size) == counted
        assert student.macs_at(size, call(model)) == macs(alone, call(model))
        assert whole_of(alone).size == size
        # the same of a fresh network reads it back
        fresh = Cut(made({"BertModel": bert, "ViTModel": vit, "CLIPTextModel": clip}.get(
            type(model).__name__, dit)), SPACE.largest).extract(model)  # fmt: skip
        again = ElasticTransformer(fresh, SPACE).extract(size)
        again.load_state_dict(alone.state_dict())
        with torch.no_grad():
            assert torch.equal(again(*args, **kwargs)[0], b)


def test_which_entries_a_slice_takes():
    model = made(dit)
    cut = Cut(model, Size(2, 24, 3, 1.5))
    t = cut.tensors(model)
    mine, theirs = "transformer_blocks.1.", "transformer_blocks.2."
    held = model.state_dict()
    row = torch.arange(6)[:, None] * 32 + torch.arange(24)
    expected = held[theirs + "norm1.linear.weight"][row.flatten()][:, :24]
    assert torch.equal(t[mine + "norm1.linear.weight"], expected)
    assert torch.equal(t[mine + "attn1.to_q.weight"], held[theirs + "attn1.to_q.weight"][:24, :24])
    assert torch.equal(t[mine + "ff.net.2.weight"], held[theirs + "ff.net.2.weight"][:24, :36])


def test_more_of_anything_costs_more(model):
    student = ElasticTransformer.from_pretrained_dense(model, SPACE)
    low = SPACE.smallest
    for name in ("depth", "hidden", "heads", "ratio"):
        high = Size(**{**vars(low), name: getattr(SPACE, name)[-1]})
        assert student.parameters_at(high) > student.parameters_at(low)
        assert student.macs_at(high, call(model)) > student.macs_at(low, call(model))


def test_bert_parameters_by_formula():
    model = made(bert)
    s = Size(3, 24, 2, 1.5)
    h, inner, n = 24, 2 * 8, 36
    block = 3 * (h * inner + inner) + inner * h + h + 2 * 2 * h + 2 * h * n + n + h
    expected = (50 + 512 + 2) * h + 2 * h + 3 * block
    assert sum(p.numel() for p in Cut(model, s).extract(model).parameters()) == expected


def test_nothing_outside_the_slice_learns():
    model = made(dit)
    student = ElasticTransformer.from_pretrained_dense(model, SPACE)
    goal = Sandwich(model, student, AttentionRelationLoss(2), sizes=lambda rng: [SPACE.smallest])
    goal.loss("student", {"call": call(model)}).total.backward()
    cut = student.cut(SPACE.smallest)
    reached = dict.fromkeys((n for n, _ in student.network.named_parameters()), None)
    for name, source in cut.sources.items():
        del name
        if source in reached:
            reached[source] = True
    for name, p in student.network.named_parameters():
        if p.grad is None:
            continue
        inside = torch.zeros_like(p, requires_grad=True)
        cut.slice_of(name, inside).sum().backward()
        assert p.grad[inside.grad == 0].abs().sum() == 0, name
        assert reached[name] or p.grad.abs().sum() == 0, name
    q = student.network.get_submodule("transformer_blocks.0.attn1.to_q").weight
    assert q.grad[:16, :16].abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_spaces():
    for space in (BASE, SMALL, TINY):
        assert len(set(space.sizes())) == 256
    for of in (6, 12):
        for depth in range(1, of + 1):
            rows = kept_blocks(depth, of)
            assert rows == sorted(set(rows))
            assert rows[0] == 0
        assert kept_blocks(of, of) == list(range(of))
    assert kept_blocks(4, 6) == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="rising"):
        SubSpace((2, 1), (8,), (1,), (1.0,))
    with pytest.raises(ValueError, match=r"hidden=640: expected 1 to 32"):
        ElasticTransformer.from_pretrained_dense(made(bert), SubSpace((2,), (640,), (2,), (1.0,)))
    with pytest.raises(TypeError, match="cannot be cut by width"):
        ElasticTransformer.from_pretrained_dense(tiny_unet(), SPACE)


# ---- relations


def qkv(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=rng, dtype=torch.float64)
    return q, k, v


def test_relations_by_hand():
    x = qkv(2, 5, 13)[0]
    r = relation(x, 3)
    assert r.shape == (2, 3, 5, 5)
    expected = x[1, 2, 4:8] @ x[1, 4, 4:8] / 2
    assert r[1, 1, 2, 4].item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="at least one channel"):
        relation(x, 14)


@pytest.mark.parametrize("distance", [KL(), MSE()])
def test_a_rotation_within_a_head_changes_nothing(distance):
    teacher, student = qkv(2, 5, 12), qkv(2, 5, 8, seed=1)
    loss = AttentionRelationLoss(4, distance)
    before = loss(teacher, student)
    turn = torch.linalg.qr(qkv(3, 3)[0]).Q
    turned = [(x.unflatten(-1, (4, 3)) @ turn).flatten(-2) for x in teacher]
    torch.testing.assert_close(loss(tuple(turned), student), before)
    assert before > 0
    assert loss(teacher, teacher) == 0
    assert loss(teacher, tuple(-x for x in teacher)) == pytest.approx(0, abs=1e-12)


def test_kl_by_hand():
    teacher, student = qkv(1, 3, 2), qkv(1, 3, 4, seed=1)
    total = 0.0
    for a, b in zip(teacher, student, strict=True):
        p, q = (relation(x, 2).softmax(-1) for x in (a, b))
        total += float((p * (p / q).log()).sum()) / (2 * 3)
    assert AttentionRelationLoss(2)(teacher, student).item() == pytest.approx(total)


@pytest.mark.parametrize("distance", [KL(), MSE()])
def test_masked_tokens_count_nothing(distance):
    teacher, student = qkv(2, 5, 8), qkv(2, 5, 8, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    loss = AttentionRelationLoss(2, distance)
    whole = loss(teacher, student, mask)
    cut = [tuple(x[:, :3] for x in t) for t in (teacher, student)]
    torch.testing.assert_close(whole, loss(*cut))
    for x in student:
        x[:, 3:] = 1e3
    torch.testing.assert_close(loss(teacher, student, mask), whole)


# ---- training and choosing


def trained(steps=25):
    model = made(dit)
    student = ElasticTransformer.from_pretrained_dense(model, SPACE)
    goal = Sandwich(model, student, AttentionRelationLoss(2))
    fit(
        goal,
        lambda rng: {"call": call(model, 4, int(torch.randint(1 << 30, (), generator=rng)))},
        torch.optim.AdamW(student.parameters(), lr=3e-3),
        steps=steps,
        rng=torch.Generator().manual_seed(0),
        progress=False,
    )
    return model, student


def test_all_sizes_learn_and_the_best_is_found():
    model, student = trained()
    fresh = ElasticTransformer.from_pretrained_dense(model, SPACE)
    loss, batches = AttentionRelationLoss(2), [{"call": call(model, 4, 10**6)}]

    def losses(s):
        return [held_out_loss(s, z, model, batches, loss) for z in SPACE.sizes()]

    after, before = losses(student), losses(fresh)
    assert sum(after) < 0.7 * sum(before)
    best, found = choose(student, model, batches, loss=loss)
    assert held_out_loss(student, best, model, batches, loss) == min(after)
    assert found.measured == 16
    least = student.macs_at(SPACE.smallest, batches[0]["call"])
    cap = 1.2 * least
    small, within = choose(student, model, batches, loss=loss, most_macs=cap)
    fits = [a for a, z in zip(after, SPACE.sizes(), strict=True)
            if student.macs_at(z, batches[0]["call"]) <= cap]  # fmt: skip
    assert held_out_loss(student, small, model, batches, loss) == min(fits)
    assert within.measured == len(fits)
    with pytest.raises(ValueError, match="the smallest sub-network needs"):
        choose(student, model, batches, loss=loss, most_macs=0.9 * least)
    _, few = choose(student, model, batches, loss=loss, tactic=LINAS(5, 50), budget=10)
    assert few.measured <= 10
    task, _ = choose(
        student, model, batches, proxy=lambda net: float(sum(p.numel() for p in net.parameters()))
    )
    assert task == SPACE.smallest


def test_all_workers_draw_the_same_sizes():
    model = made(dit)
    drawn = []
    for _ in range(2):
        student = ElasticTransformer.from_pretrained_dense(model, SPACE)
        goal = Sandwich(model, student, AttentionRelationLoss(2), seed=3)
        asked = []
        plain = student.read
        student.read = lambda size, c, lesson, plain=plain, asked=asked: (
            asked.append(size) or plain(size, c, lesson)
        )
        torch.rand(1)
        for _ in range(3):
            goal.loss("student", {"call": call(model)})
        drawn.append(asked)
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12
    assert drawn[0][0::4] == [SPACE.largest] * 3
    assert drawn[0][1::4] == [SPACE.smallest] * 3
    assert len(set(drawn[0][2::4] + drawn[0][3::4])) > 2


def test_relations_end_the_run_where_they_are_known(model):
    whole = whole_of(model).size
    student = ElasticTransformer.from_pretrained_dense(
        model, SubSpace((whole.depth,), (whole.hidden,), (whole.heads,), (whole.ratio,))
    )
    family, (args, kwargs) = family_of(model), call(model)
    rows = model.get_submodule(family.blocks)
    attention, heard, ended = rows[-1].get_submodule(family.attention), [], []
    hooks = [
        attention.get_submodule(n).register_forward_hook(lambda m, a, out: heard.append(out))
        for n in family.qkv
    ]
    hooks.append(rows[-1].register_forward_hook(lambda *_: ended.append(1)))
    model(*args, **kwargs)
    assert len(ended) == 1
    loss = AttentionRelationLoss(4)
    got = read_of(model, {"call": call(model)}, loss)
    assert len(ended) == 1
    for h in hooks:
        h.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, loss.relations(heard[:3]), strict=True))
    mine = student.read(whole, {"call": call(model)}, loss)
    assert all(torch.equal(a, b) for a, b in zip(got, mine, strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_answers_by_hand():
    a, b, _ = qkv(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert Answer().apart([a], [b]).item() == pytest.approx(float((a - b).pow(2).mean()))
    part = torch.cat([(a - b)[0, :3], (a - b)[1]]).pow(2).mean()
    assert Answer().apart([a], [b], mask).item() == pytest.approx(float(part))


# ---- a student in its pipeline


def test_a_slice_comes_off_and_costs_what_it_says(model):
    (args, kwargs) = call(model)
    with torch.no_grad():
        before = model(*args, **kwargs)[0]
    handle = Slice(depth=2, hidden=24, ratio=1.5).attach(model)
    assert whole_of(model).size == Size(2, 24, 4, 1.5)
    assert handle.report()["parameters"] == sum(p.numel() for p in model.parameters())
    assert handle.report()["parameters"] < handle.report()["parameters_before"]
    with torch.no_grad():
        assert not torch.equal(model(*args, **kwargs)[0], before)
    handle.detach()
    with torch.no_grad():
        assert torch.equal(model(*args, **kwargs)[0], before)
    with pytest.raises(ValueError, match="expected 1 to 32"):
        Slice(hidden=33).attach(model)
    with pytest.raises(ValueError, match="where leaves out"):
        Slice(depth=1, where=lambda name, m: False).attach(model)


def test_from_a_teacher_to_a_saved_pipeline(tmp_path):
    """Train all sizes on answers, choose with LINAS, put the student in, save, load, sample."""
    from effuse.bridge import store

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = tiny_dit_pipe(num_layers=4, num_attention_heads=4, attention_head_dim=8)
    teacher = copy.deepcopy(pipe.transformer).eval()
    student = ElasticTransformer.from_pretrained_dense(teacher, SPACE)
    held = [{"call": call(teacher, 4, 10**6)}]
    before = held_out_loss(student, SPACE.largest, teacher, held, Answer())
    fit(
        Sandwich(teacher, student, Answer()),
        lambda rng: {"call": call(teacher, 4, int(torch.randint(1 << 30, (), generator=rng)))},
        torch.optim.AdamW(student.parameters(), lr=3e-3),
        steps=12,
        rng=torch.Generator().manual_seed(0),
        progress=False,
    )
    assert held_out_loss(student, SPACE.largest, teacher, held, Answer()) < 0.7 * before
    cap = 0.9 * student.macs_at(SPACE.largest, held[0]["call"])
    size, found = choose(
        student, teacher, held, loss=Answer(), most_macs=cap, tactic=LINAS(4, 40), budget=8
    )
    assert found.measured <= 8
    assert student.macs_at(size, held[0]["call"]) <= cap
    handle = Slice(**vars(size)).attach(pipe.transformer)
    pipe.transformer.load_state_dict(student.extract(size).state_dict())
    drawn = _drawn(pipe)
    again = store.load(store.save(pipe, tmp_path / "pipe", [("transformer", handle)]))
    assert whole_of(again.transformer).size == size
    assert torch.equal(_drawn(again), drawn)
    again.transformer.eval()
    alone = held_out_loss(student, size, teacher, held, Answer())
    with torch.no_grad():
        target, out = (read_of(m, held[0], Answer()) for m in (teacher, again.transformer))
    assert Answer().apart(target, out).item() == pytest.approx(alone, rel=1e-5)


def _drawn(pipe):
    rng = torch.Generator().manual_seed(0)
    out = pipe([1, 2], guidance_scale=1.0, num_inference_steps=2, generator=rng, output_type="np")
    return torch.from_numpy(out.images)
