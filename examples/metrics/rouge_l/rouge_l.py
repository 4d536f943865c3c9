"""ROUGE-L, as a local module of `evaluate`: works without the hub and without a tokenizer of its own."""

import re

import datasets
import evaluate
import numpy as np


class RougeL(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="The F-measure of the longest common subsequence of words, averaged over texts.",
            citation="Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004.",
            inputs_description="predictions, references: texts. Words are runs of letters and digits, in lower case.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        return {"rouge_l": float(np.mean([score(p, r) for p, r in zip(predictions, references, strict=True)]))}


def score(prediction: str, reference: str) -> float:
    left, right = (re.findall(r"\w+", text.lower()) for text in (prediction, reference))
    lengths = [0] * (len(right) + 1)  # of the longest common subsequence of `left` so far and right[:i]
    for word in left:
        before = lengths
        lengths = [0]
        for i, other in enumerate(right):
            lengths.append(before[i] + 1 if word == other else max(lengths[i], before[i + 1]))
    return 2 * lengths[-1] / (len(left) + len(right)) if left and right else 0.0
