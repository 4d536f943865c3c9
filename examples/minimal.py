"""The least there is to it: MiniLM-L6 learns to sort news, and nobody chooses a learning rate.

python examples/minimal.py
"""

from datasets import load_dataset
from quickstart import CACHE, minilm, reuters
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from hf_lqa import LQATrainer
from hf_lqa.plot import plot

data = load_dataset("csv", data_files=str(reuters(CACHE)[0]), split="train").class_encode_column("label")
model = AutoModelForSequenceClassification.from_pretrained(minilm(CACHE), num_labels=data.features["label"].num_classes)
tokenizer = AutoTokenizer.from_pretrained(minilm(CACHE))
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64)).train_test_split(0.1, seed=0)

args = TrainingArguments("out/minimal", optim="lqa", max_steps=100, per_device_train_batch_size=16, logging_steps=5)
trainer = LQATrainer(model, args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer)
trainer.compute_metrics = lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()}
trainer.train()
trainer.save_model()
trainer.save_state()
print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.4f}\nmodel: out/minimal\nplot: {plot('out/minimal')}")
print("next: python -m hf_lqa.plot out/minimal --details")
