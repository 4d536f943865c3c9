"""Losses whose value is no scale: the first probe finds one, and training is AdamW's all the same."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_lqa import LQA, ReplayedLoss, Verdict
from hf_lqa.quadratic import is_beyond
from hf_lqa.rule.prior import PriorConfig, base_step_size
from hf_lqa.rule.radius import RadiusConfig

STEPS = 100


class Data:
    def __init__(self):
        self.x = torch.randn(1000, 12)
        self.r = self.x @ torch.randn(12, 4)
        self.y = self.r.argmax(1)


def classifier():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


def cross_entropy(model, data, rows):
    return F.cross_entropy(model(data.x[rows]), data.y[rows])


def error(model, data):
    return 1 - (model(data.x).argmax(1) == data.y).float().mean().item()


def of_cross_entropy(change):
    return lambda model, data, rows, draw: change(cross_entropy(model, data, rows))


def policy_gradient(kind):
    """Its value is 0, what rounding makes of it, or noise; never a measure of what is to be learned."""

    def loss(model, data, rows, draw):
        log_p = F.log_softmax(model(data.x[rows]).repeat(4, 1), 1)
        actions = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        reward = (actions[:, 0] == data.y[rows].repeat(4)).float().view(4, -1)
        advantage = reward - reward.mean(0)
        if kind == "grpo":
            advantage = advantage / (reward.std(0) + 1e-4)
        taken = log_p.gather(1, actions)[:, 0]
        if kind == "reinforce":
            return -((reward - reward.mean()).view(-1) * taken).mean()
        return -(advantage.view(-1) * torch.exp(taken - taken.detach())).mean()

    return loss


def detached_factor(model, data, rows, draw):
    """As of "dft": what is differentiated is not the value, which rises where the loss is to fall."""
    each = F.cross_entropy(model(data.x[rows]), data.y[rows], reduction="none")
    return (torch.exp(-each).detach() * each).mean()


def straight_through(model, data, rows, draw):
    hidden = torch.tanh(model[0](data.x[rows]))
    return F.cross_entropy(model[2](hidden + (hidden.sign() - hidden).detach()), data.y[rows])


def contrastive(model, data, rows, draw):
    mine, theirs = F.normalize(model(data.x[rows]), dim=1), F.normalize(data.r[rows], dim=1)
    return F.cross_entropy(mine @ theirs.T / 0.2, torch.arange(len(mine))) - math.log(len(mine))


def contrast_left(model, data):
    return 1 - F.cosine_similarity(model(data.x), data.r).mean().item()


def trained(loss_of, optimizer_of, seed, steps=STEPS):
    """A model, its data and its optimizer after training."""
    torch.manual_seed(seed)
    data, model = Data(), classifier()
    optimizer = optimizer_of(model.parameters())
    if isinstance(optimizer, LQA):
        optimizer.plan(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        rows, draw = torch.randint(1000, (32,)), int(torch.randint(2**31, ()))

        def loss(rows=rows, draw=draw):
            return loss_of(model, data, rows, torch.Generator().manual_seed(draw))

        optimizer.zero_grad()
        if isinstance(optimizer, LQA) and optimizer.wants_probe:
            closure = ReplayedLoss(model)
            closure.record(loss).backward()
            optimizer.step(closure)
        else:
            loss().backward()
            optimizer.step()
        schedule.step()
    return model.requires_grad_(False), data, optimizer


def adamw(rate):
    return lambda params: torch.optim.AdamW(params, lr=rate)


def lqa(params):
    return LQA(torch.optim.AdamW(params, lr=1.0))


def lqa_sgd(params):
    return LQA(torch.optim.SGD(params, lr=1.0))


def lqa_momentum(params):
    return LQA(torch.optim.SGD(params, lr=1.0, momentum=0.9))


def lqa_paper(params):
    return LQA(torch.optim.SGD(params, lr=1.0), "paper")


KINDS = {
    "a constant": of_cross_entropy(lambda loss: loss + 100),
    "a large constant": of_cross_entropy(lambda loss: loss + 1e4),
    "far below zero": of_cross_entropy(lambda loss: loss - 1e3),
    "crosses zero": of_cross_entropy(lambda loss: loss - math.log(4)),
    "always zero": of_cross_entropy(lambda loss: loss - loss.detach()),
    "tiny": of_cross_entropy(lambda loss: 1e-6 * loss),
    "huge": of_cross_entropy(lambda loss: 1e6 * loss),
    "grpo": policy_gradient("grpo"),
    "rloo": policy_gradient("rloo"),
    "reinforce": policy_gradient("reinforce"),
    "detached factor": detached_factor,
    "straight through": straight_through,
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_where_adamw_does_whatever_the_value(kind):
    for seed in range(3):
        untrained = error(classifier(), Data())
        reference = error(*trained(KINDS[kind], adamw(1e-2), seed)[:2])
        found = error(*trained(KINDS[kind], lqa, seed)[:2])
        assert found < 2 * reference + 0.05 < untrained, (seed, found, reference)


def test_a_contrastive_loss_below_zero():
    for seed in range(3):
        reference = contrast_left(*trained(contrastive, adamw(1e-2), seed)[:2])
        assert contrast_left(*trained(contrastive, lqa, seed)[:2]) < 2 * reference + 0.02, seed


NO_MINIMISER = pytest.mark.xfail(
    reason="seed 1: the first batch's parabola has no minimiser, so that the base step size may not grow, whatever the"
    " sign agreement (-0.7) says",
    strict=True,
)
FAR = [*[(1e3, 1e4), (30.0, -300.0)], *[pytest.param(*far, marks=NO_MINIMISER) for far in ((1e3, 0.0), (1.0, 1e4))]]


@pytest.mark.parametrize(("scale", "shift"), FAR)
def test_targets_far_from_zero(scale, shift):
    def squares(model, data, rows, draw=None):
        return F.mse_loss(model(data.x[rows]), scale * data.r[rows] + shift)

    for seed in range(2):

        def left(rate_or_lqa, seed=seed):
            return float(squares(*trained(squares, rate_or_lqa, seed)[:2], slice(None)))

        best = min(left(adamw(rate)) for rate in (3e-2, 3e-1))
        found = left(lqa)
        assert found < 10 * best, (seed, found, best)


FEW = ["a constant", "a large constant", "always zero", "huge", "crosses zero"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("optimizer_of", [lqa_sgd, lqa_paper])
@pytest.mark.parametrize("kind", FEW)
def test_plain_gradients_and_the_published_rule_learn_too(kind, optimizer_of, seed):
    assert error(*trained(KINDS[kind], optimizer_of, seed)[:2]) < 0.2


def test_gradients_with_momentum_learn_too():
    for kind in FEW:
        for seed in range(2):
            assert error(*trained(KINDS[kind], lqa_momentum, seed)[:2]) < 0.2, (kind, seed)


@pytest.mark.parametrize("optimizer_of", [lqa_sgd, lqa_momentum, lqa_paper])
@pytest.mark.parametrize(("scale", "shift"), [(1e5, 1e6)])
def test_plain_gradients_and_the_published_rule_do_not_diverge_on_targets_far_from_zero(optimizer_of, scale, shift):
    def squares(model, data, rows, draw=None):
        return F.mse_loss(model(data.x[rows]), scale * data.r[rows] + shift)

    for seed in range(3):
        torch.manual_seed(seed)
        data, untrained = Data(), classifier()
        first = float(squares(untrained, data, slice(None)))
        model, data, _ = trained(squares, optimizer_of, seed)
        assert float(squares(model, data, slice(None))) < first


@pytest.mark.parametrize("optimizer_of", [lqa, lqa_sgd, lqa_momentum, lqa_paper])
def test_a_first_batch_without_loss_or_gradient_is_waited_for(optimizer_of):
    def loss_of(model, data, rows, draw):
        seen.append(None)
        return cross_entropy(model, data, rows) * (0.0 if len(seen) == 1 else 1.0)

    for seed in range(3):
        seen = []
        model, data, optimizer = trained(loss_of, optimizer_of, seed)
        assert error(model, data) < 0.2 and optimizer.counts["searched"] == 0


@pytest.mark.parametrize("optimizer_of", [lqa, lqa_paper])
def test_a_first_batch_that_is_learned_already(optimizer_of):
    """Its loss is a millionth of what its slope would be worth."""

    def loss_of(model, data, rows, draw):
        steps.setdefault(draw.initial_seed(), len(steps))
        loss = cross_entropy(model, data, rows)
        return loss - (1 - 1e-6) * loss.detach() if steps[draw.initial_seed()] == 0 else loss

    for seed in range(3):
        steps = {}
        assert error(*trained(loss_of, optimizer_of, seed)[:2]) < 0.15, seed


def first_probe(loss_of, seed=0, **options):
    return trained(loss_of, lambda params: LQA(torch.optim.AdamW(params, lr=1.0), **options), seed, steps=1)[2]


def test_a_first_probe_looks_further_only_where_the_losss_value_misleads():
    for constant in (0.0, 10.0, 100.0, 1e4):
        for seed in range(5):
            optimizer = first_probe(of_cross_entropy(lambda loss, constant=constant: loss + constant), seed)
            probe = optimizer.last_probe
            assert probe.loss_plus < probe.loss_center
            assert optimizer.counts["searched"] == (not probe.by_loss)
            assert probe.by_loss or constant
            assert (optimizer.counts["probe_forwards"] == 2) is probe.by_loss, "dearer in trouble only"


def test_a_loss_without_a_value_is_probed_where_shapes_say():
    optimizer = first_probe(KINDS["always zero"])
    prior = base_step_size([p.shape for p in classifier().parameters()], 1, PriorConfig())
    assert optimizer.last_probe.radius == pytest.approx(prior, rel=0.01)
    assert optimizer.base_step_size == pytest.approx(prior, rel=0.01)
    assert optimizer.last_probe.fit.verdict is Verdict.BELOW_NOISE and optimizer.counts["searched"] == 1
    given = first_probe(KINDS["always zero"], probe_radius=1e-5)
    assert given.last_probe.radius == 1e-5, "what is given is not changed"


def test_where_the_loss_explodes_at_any_distance_the_probes_end():
    torch.manual_seed(0)
    Data()
    origin = [p.detach().clone() for p in classifier().parameters()]

    def loss_of(model, data, rows, draw):
        here = all(torch.equal(w, o) for w, o in zip(model.parameters(), origin, strict=True))
        return cross_entropy(model, data, rows) * (1.0 if here else math.inf)

    optimizer = first_probe(loss_of)
    assert optimizer.last_probe.fit.verdict is Verdict.NON_FINITE and optimizer.step_size == 0
    assert optimizer.counts["probe_forwards"] == 2 * RadiusConfig.tries


@pytest.mark.parametrize(
    ("minus", "plus", "beyond"),
    [
        (1.03, 0.97, False),
        (1.5, 1.2, True),
        (0.9, 1.1, False),  # straight, and not what was differentiated
        (0.99, 9.0, True),  # an explosion ahead alone
        (9.0, 0.3, True),  # one behind: what there is ahead is none of the slope's doing
        (1.07, 0.995, False),
        (1.0, 1.0, False),
        (math.nan, 0.97, True),
        (1.03, math.inf, True),
    ],
)
def test_what_is_beyond(minus, plus, beyond):
    assert is_beyond(minus, 1.0, plus, 0.03) is beyond
    assert is_beyond(minus, 1.0, plus, 0.03, noise=math.inf) is not (math.isfinite(minus) and math.isfinite(plus))


WORDS = [f"w{i}" for i in range(29)]


def trl_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.mark.parametrize("name", ["RLOO", "GRPO"])
def test_trls_policy_gradients_learn(name, tmp_path):
    trl = pytest.importorskip("trl")
    from common import tiny_llama
    from datasets import Dataset

    from hf_lqa import LQATrainerMixin

    mine = type("Mine", (LQATrainerMixin, getattr(trl, f"{name}Trainer")), {})

    def reward(completions, **kwargs):
        return [sum(word == "w5" for word in text.split()) / 8 for text in completions]

    options = {"num_generations": 8, "per_device_train_batch_size": 32, "max_completion_length": 8, "beta": 0.0}
    args = getattr(trl, f"{name}Config")(
        str(tmp_path), optim="lqa", max_steps=60, logging_steps=1, bf16=False, gradient_checkpointing=False,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **options
    )  # fmt: skip
    trainer = mine(
        model=tiny_llama(vocab_size=32, hidden_size=64, intermediate_size=128, max_position_embeddings=64),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"w{i % 29} w{7 * i % 29}"} for i in range(256)]),
        processing_class=trl_tokenizer(),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > 0.3 > 6 * sum(rewards[:3]) / 3


def test_trls_dft_loss_learns(tmp_path):
    """Its value is not what is differentiated: the probability that weights a token's loss is detached."""
    trl = pytest.importorskip("trl")
    from common import tiny_llama
    from datasets import Dataset

    from hf_lqa import LQATrainerMixin

    mine = type("Mine", (LQATrainerMixin, trl.SFTTrainer), {})
    texts = [" ".join(f"w{(3 * i + j) % 29}" for j in range(8)) for i in range(256)]
    kept = {"loss_type": "dft", "per_device_train_batch_size": 16, "max_steps": 60, "logging_steps": 1, "seed": 0}

    def likelihood(optim, trainer_class, **options):
        torch.manual_seed(0)
        model = tiny_llama(vocab_size=32, hidden_size=64, intermediate_size=128, max_position_embeddings=64)
        args = trl.SFTConfig(
            str(tmp_path), optim=optim, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, **kept, **options
        )  # fmt: skip
        data = Dataset.from_list([{"text": text} for text in texts])
        trainer = trainer_class(model=model, args=args, train_dataset=data, processing_class=trl_tokenizer())
        trainer.train()
        ids = torch.tensor([trl_tokenizer()(text)["input_ids"] for text in texts[:64]])
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    best = min(likelihood("adamw_torch", trl.SFTTrainer, learning_rate=rate) for rate in (1e-3, 1e-2))
    assert likelihood("lqa", mine) < max(1.5 * best, best + 0.2)
