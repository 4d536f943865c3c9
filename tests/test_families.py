"""Trainers other than `Trainer`: their own metrics are what they are without probes."""

import pytest
import torch
from common import Recorder, assert_same_weights, tiny_bert, tiny_llama, weights
from test_setups import PAPER, Replays
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import hf_lqa

WORDS = [f"w{i}" for i in range(56)]
COMMON = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "bf16": False,
}
#: A probe at every step.
OFTEN = PAPER


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {w: i + 4 for i, w in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentence(i, n):
    return " ".join(WORDS[(i * 7 + j * (i + 1)) % 56] for j in range(n))


def dataset(rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def check(trainer, recorder, replays):
    assert trainer.lqa.counts["probe_forwards"] == 2 * len(recorder.steps) > 0
    assert replays.pairs and all(a == b for a, b in replays.pairs), replays.pairs
    assert all(len(set(step["losses"])) == 3 for step in recorder.steps)


def trained(make, folder):
    """The family's trainer after training with a probe at every step."""
    trainer = make(folder, OFTEN)
    recorder, replays = Recorder(trainer), Replays(trainer)
    trainer.train()
    check(trainer, recorder, replays)
    return trainer


def counters(trainer, names):
    found = [{k: e[k] for k in names if k in e} for e in trainer.state.log_history if "loss" in e]
    assert all(set(e) == set(names) for e in found), (names, trainer.state.log_history[0])
    return found


def test_seq2seq_trainer_generates_in_evaluation(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=60, **sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    )
    words = tokenizer()
    rows = [
        {"input_ids": words(sentence(i, 3 + i % 4))["input_ids"], "labels": words(sentence(i, 2 + i % 3))["input_ids"]}
        for i in range(32)
    ]
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        **COMMON,
        **OFTEN,
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.predictions)}

    trainer = hf_lqa.LQASeq2SeqTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows[:6],
        data_collator=DataCollatorForSeq2Seq(words, model=model),
        compute_metrics=metrics,
    )
    recorder, replays = Recorder(trainer), Replays(trainer)
    trainer.train()
    check(trainer, recorder, replays)
    assert len(shapes) == 2 and all(s[0] == 6 for s in shapes)


def sft(folder, options):
    trl = pytest.importorskip("trl")

    class LQASFTTrainer(hf_lqa.LQATrainerMixin, trl.SFTTrainer):
        pass

    kind = LQASFTTrainer if options["optim"].startswith("lqa") else trl.SFTTrainer
    args = trl.SFTConfig(str(folder), **{**COMMON, **options}, max_length=16, gradient_checkpointing=False)
    data = dataset([{"text": sentence(i, 4 + i % 5)} for i in range(32)])
    return kind(tiny_llama(), args, train_dataset=data, processing_class=tokenizer())


def dpo(folder, options):
    trl = pytest.importorskip("trl")

    class LQADPOTrainer(hf_lqa.LQATrainerMixin, trl.DPOTrainer):
        pass

    kind = LQADPOTrainer if options["optim"].startswith("lqa") else trl.DPOTrainer
    args = trl.DPOConfig(str(folder), **{**COMMON, **options}, max_length=16, gradient_checkpointing=False)
    data = dataset(
        [{"prompt": sentence(i, 3), "chosen": sentence(i + 1, 3), "rejected": sentence(i + 2, 4)} for i in range(32)]
    )
    return kind(tiny_llama(), tiny_llama(), args=args, train_dataset=data, processing_class=tokenizer())


def reward(folder, options):
    trl = pytest.importorskip("trl")

    class LQARewardTrainer(hf_lqa.LQATrainerMixin, trl.RewardTrainer):
        pass

    kind = LQARewardTrainer if options["optim"].startswith("lqa") else trl.RewardTrainer
    args = trl.RewardConfig(str(folder), **{**COMMON, **options}, max_length=16, gradient_checkpointing=False)
    data = dataset([{"chosen": sentence(i, 4), "rejected": sentence(i + 2, 3 + i % 3)} for i in range(32)])
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "num_labels": 1})
    model = LlamaForSequenceClassification(config)
    return kind(model, args=args, train_dataset=data, processing_class=tokenizer())


@pytest.mark.parametrize(
    ("make", "names"),
    [(sft, ["num_tokens", "mean_token_accuracy", "entropy"]), (dpo, ["num_tokens"]), (reward, ["num_tokens"])],
    ids=["SFT", "DPO", "Reward"],
)
def test_trls_metrics_do_not_count_probes(make, names, tmp_path):
    probed = trained(make, tmp_path / "probed")
    stock = make(tmp_path / "stock", {"optim": "adamw_torch"})
    stock.train()
    # Token counts do not depend on the weights; averages of the first step come from the same weights.
    assert [e["num_tokens"] for e in counters(probed, names)] == [e["num_tokens"] for e in counters(stock, names)]
    own = [k for k in stock.state.log_history[0] if k not in ("learning_rate", "epoch")]
    first = probed.state.log_history[0], stock.state.log_history[0]
    for key in own:
        assert first[0][key] == pytest.approx(first[1][key], rel=1e-6), key


def sentences(folder, options):
    st = pytest.importorskip("sentence_transformers")
    try:
        from sentence_transformers.sentence_transformer import losses, modules
    except ImportError:  # before version 6
        from sentence_transformers import losses
        from sentence_transformers import models as modules

    class LQASentenceTrainer(hf_lqa.LQATrainerMixin, st.SentenceTransformerTrainer):
        pass

    tiny_bert(dropout=0.1).bert.save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    word = modules.Transformer(str(folder / "bert"), max_seq_length=16)
    model = st.SentenceTransformer(modules=[word, modules.Pooling(16)], device="cpu")
    args = st.SentenceTransformerTrainingArguments(str(folder / "run"), **{**COMMON, **options})
    data = dataset([{"anchor": sentence(i, 4), "positive": sentence(i, 3)} for i in range(32)])
    return LQASentenceTrainer(model, args, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model))


def test_sentence_transformers_trainer(tmp_path):
    trained(sentences, tmp_path)


@pytest.mark.parametrize(
    ("make", "subfolder"),
    [(sft, ""), (dpo, ""), (reward, ""), (sentences, "run")],
    ids=["SFT", "DPO", "Reward", "sentence-transformers"],
)
def test_families_resume(make, subfolder, tmp_path):
    """As if never interrupted; but TRL counts tokens from 0 again, with any optimizer."""
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "lqa", "optim_args": "probe_interval=2"}
    found = []
    for name in ("straight", "resumed"):
        trainer = make(tmp_path / name, saving)
        checkpoint = tmp_path / "straight" / subfolder / "checkpoint-2"
        trainer.train(resume_from_checkpoint=str(checkpoint) if name == "resumed" else None)
        logs = [{k: v for k, v in e.items() if k != "num_tokens"} for e in trainer.state.log_history if "loss" in e]
        found.append((trainer, logs))
    (straight, logs), (resumed, again) = found
    assert_same_weights(weights(straight.model), weights(resumed.model))
    assert logs == again and len({e["learning_rate"] for e in logs}) > 1


def test_grpo_generates_once_per_step(tmp_path):
    trl = pytest.importorskip("trl")
    rewards = []

    class LQAGRPOTrainer(hf_lqa.LQATrainerMixin, trl.GRPOTrainer):
        pass

    def lengths(completions, **kwargs):
        rewards.append(len(completions))
        return [float(len(c) + i % 2) for i, c in enumerate(completions)]

    found = []
    for options in (OFTEN, {"optim": "adamw_torch"}):
        rewards.clear()
        args = trl.GRPOConfig(
            str(tmp_path / options["optim"]),
            **{**COMMON, "max_steps": 2},
            **options,
            num_generations=2,
            max_completion_length=4,
            gradient_checkpointing=False,
        )
        data = dataset([{"prompt": sentence(i, 3)} for i in range(16)])
        kind = LQAGRPOTrainer if options is OFTEN else trl.GRPOTrainer
        trainer = kind(tiny_llama(), lengths, args=args, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        found.append((list(rewards), [e["num_tokens"] for e in trainer.state.log_history if "num_tokens" in e][:1]))
        if options is OFTEN:
            assert trainer.lqa.counts["probe_forwards"] > 0
    assert found[0] == found[1]


def test_a_stock_trainer_refuses(tmp_path):
    with pytest.raises(ValueError, match="LQATrainerMixin"):
        trainer = Trainer(tiny_bert(), Seq2SeqTrainingArguments(str(tmp_path), **COMMON, **OFTEN), train_dataset=[{}])
        trainer.create_optimizer()
