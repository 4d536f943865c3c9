"""A folder in which every name that the documentation uses is there, and tiny: models, data sets, files, metrics.

Commands of the documentation run in it offline and to the letter, shortened by flags at their end. What is a hub's name
there is a folder here: Transformers, Datasets and Evaluate look for one first.
"""

import csv
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORDS = "the a one red green blue big small house tree river dog cat sees likes crosses and slowly gladly".split()
CLASSES = ["red", "green", "blue"]
LENGTH = 384
SHORT = (
    "--max_steps 2 --logging_steps 1 --save_strategy no --report_to none --use_cpu --dataloader_pin_memory False"
    " --disable_tqdm True --per_device_train_batch_size 8"
)
#: What the names of the documentation stand for.
MODELS = {
    "bert": ["google-bert/bert-base-cased", "google-bert/bert-base-uncased", "path/to/model"],
    "llama": ["openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M"],
    "t5": ["google-t5/t5-small"],
    "vit": ["google/vit-base-patch16-224-in21k"],
}

METRIC = """
import datasets
import evaluate


class Exact(evaluate.Metric):
    def _info(self):
        features = datasets.Features({features})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, **options):
        return {{"{name}": sum(map(self.equal, predictions, references)) / len(references)}}

    def equal(self, prediction, reference):
        return {equal}
"""
#: The metrics that the official scripts load by name: their features, the name of a result, and what is right.
METRICS = {
    "glue": ("dict.fromkeys(['predictions', 'references'], datasets.Value('int64'))", "f1", "prediction == reference"),
    "rouge": ("dict.fromkeys(['predictions', 'references'], datasets.Value('string'))", "rouge1", "0.5"),
    "squad": (
        "{'predictions': {'id': datasets.Value('string'), 'prediction_text': datasets.Value('string')}, 'references':"
        " {'id': datasets.Value('string'), 'answers': datasets.Sequence({'text': datasets.Value('string'),"
        " 'answer_start': datasets.Value('int32')})}}",
        "f1",
        "prediction['prediction_text'] in reference['answers']['text']",
    ),
}


def sentences(count: int = 96) -> list[tuple[str, str]]:
    """Sentences whose first word says which class they are of."""
    generator = random.Random(0)
    drawn = [generator.choices(WORDS, k=generator.randint(4, 12)) for _ in range(count)]
    return [(CLASSES[i % 3], " ".join([CLASSES[i % 3], *words])) for i, words in enumerate(drawn)]


def tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="[SEP]", bos_token="[CLS]", model_max_length=LENGTH, **names
    )


def make_models(folder: Path, texts: list[str]) -> None:
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    tiny = {
        "bert": BertModel(BertConfig(vocab_size=200, max_position_embeddings=LENGTH, **size)),
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=200, max_position_embeddings=LENGTH, **size)),
        "t5": T5ForConditionalGeneration(T5Config(vocab_size=200, pad_token_id=0, eos_token_id=3, **t5)),
        "vit": ViTModel(ViTConfig(image_size=8, patch_size=4, **size)),
    }
    texts_to_tokens = tokenizer(texts)
    for name, model in tiny.items():
        model.save_pretrained(folder / name)
        if name == "vit":
            ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / name)
        else:
            texts_to_tokens.save_pretrained(folder / name)
        for other in MODELS[name]:
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).symlink_to(folder / name, target_is_directory=True)


def make_files(folder: Path, texts: list[tuple[str, str]]) -> None:
    """Tables, texts and images of one's own."""
    from PIL import Image

    def table(name: str, columns: list[str], rows: Any) -> None:
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])

    for name, part in (("train", texts[:72]), ("validation", texts[72:])):
        columns = ["label", "text", "summary", "score"]
        table(f"{name}.csv", columns, [(label, text, label, len(text) / 10) for label, text in part])
        (folder / f"{name}.txt").write_text("\n".join(text for _, text in part * 8), encoding="utf-8")
        for i in range(24):
            path = folder / "images" / name / ("dark" if i % 2 else "light") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, i, i) if i % 2 else (250 - i, 250, 250)).save(path)
    lines = [json.dumps({"prompt": text, "completion": f" {label}"}) for label, text in texts]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    # What quickstart.py keeps after it has fetched it.
    cache = folder / "cache"
    (cache / "reuters-r8").mkdir(parents=True)
    (cache / "minilm-l6").symlink_to(folder / "bert", target_is_directory=True)
    for name, of in (("train", "train"), ("test", "validation")):
        shutil.copy(folder / f"{of}.csv", cache / "reuters-r8" / f"{name}.csv")
    (cache / "reuters-r8" / "complete").touch()
    (folder / "bert" / "complete").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hf_lqa").symlink_to(cache, target_is_directory=True)


def make_data_sets(folder: Path, texts: list[tuple[str, str]]) -> None:
    """Data sets of the hub, with their columns and types."""
    from datasets import ClassLabel, Dataset, Image

    rows = [{"text": text, "class": CLASSES.index(label)} for label, text in texts]
    two = ClassLabel(names=["no", "yes"])
    answers = [{"text": [label], "answer_start": [0]} for label, _ in texts]
    pixels = {"dark": (0, 0, 0), "light": (250, 250, 250)}
    pictures = [{"image": png((8, 8), color), "labels": i} for i, color in enumerate(pixels.values())] * 12
    sets = {
        "nyu-mll/glue/mrpc": [
            {"sentence1": r["text"], "sentence2": r["text"], "label": r["class"] % 2, "idx": i}
            for i, r in enumerate(rows)
        ],
        "nyu-mll/glue/sst2": [{"sentence": r["text"], "label": r["class"] % 2, "idx": i} for i, r in enumerate(rows)],
        "Salesforce/wikitext/wikitext-2-raw-v1": [{"text": r["text"]} for r in rows] * 8,
        "EdinburghNLP/xsum/default": [
            {"document": r["text"], "summary": CLASSES[r["class"]], "id": str(i)} for i, r in enumerate(rows)
        ],
        "rajpurkar/squad/plain_text": [
            {"id": str(i), "title": "", "context": r["text"], "question": "which colour", "answers": answers[i]}
            for i, r in enumerate(rows)
        ],
        "AI-Lab-Makerere/beans/default": pictures,
    }
    columns = {"label": two, "labels": ClassLabel(names=list(pixels)), "image": Image()}
    configs: dict[Path, list[dict[str, Any]]] = {}
    for name, content in sets.items():
        repository, config = folder / Path(name).parent, Path(name).name
        files = []
        for split, rows_of in (("train", content), ("validation", content[:80]), ("test", content[:80])):
            data = Dataset.from_list(rows_of)
            for column in columns.keys() & {*data.column_names}:
                data = data.cast_column(column, columns[column])
            path = Path(config) / f"{split}.parquet"
            (repository / config).mkdir(parents=True, exist_ok=True)
            data.to_parquet(repository / path)
            files.append({"split": split, "path": str(path)})
        configs.setdefault(repository, []).append({"config_name": config, "data_files": files})
    for repository, found in configs.items():
        # JSON is YAML.
        (repository / "README.md").write_text(f"---\n{json.dumps({'configs': found})}\n---\n")


def png(size: tuple[int, int], color: tuple[int, int, int]) -> dict[str, Any]:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def make_metrics(folder: Path) -> None:
    for name, (features, result, equal) in METRICS.items():
        (folder / name).mkdir()
        (folder / name / f"{name}.py").write_text(METRIC.format(features=features, name=result, equal=equal))
    (folder / "accuracy").symlink_to(ROOT / "examples" / "metrics" / "accuracy", target_is_directory=True)
    # What run_summarization.py's nltk splits sentences with: nothing known, so that every full stop ends one.
    english = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    (folder / "nltk_data" / "tokenizers" / "punkt").mkdir()
    for file in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / file).touch()


def make_configs(folder: Path) -> None:
    """The files of configs/, those of the examples shortened."""
    import yaml

    shutil.copytree(ROOT / "configs" / "accelerate", folder / "configs" / "accelerate")
    for path in (ROOT / "configs").glob("*.yaml"):
        arguments = yaml.safe_load(path.read_text())
        argv = shlex.split(SHORT)
        arguments |= {k[2:]: yaml.safe_load(v) for k, v in re.findall(r"(--\w+) ([^-]\S*)", SHORT)}
        arguments |= {"use_cpu": "--use_cpu" in argv, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
        if path.stem == "trl_sft":
            arguments |= {"max_length": 64}
        (folder / "configs" / path.name).write_text(yaml.safe_dump(arguments))


def build(folder: Path) -> Path:
    texts = sentences()
    make_models(folder, [text for _, text in texts])
    make_files(folder, texts)
    make_data_sets(folder, texts)
    make_metrics(folder)
    make_configs(folder)
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(folder: Path, command: str, timeout: float = 300) -> str:
    """Run a shell command in the workspace, and return what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HOME", None)
    env |= {"NLTK_DATA": str(folder / "nltk_data"), "PET_MASTER_PORT": str(free_port()), "MPLBACKEND": "Agg"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = command.replace("accelerate launch ", f"accelerate launch --main_process_port {free_port()} ")
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return found


def probed(folder: Path) -> bool:
    """It was LQA that trained the run in this folder."""
    return max(entry.get("lqa_probe_forwards", 0) for entry in state(folder)["log_history"]) > 0
