"""Pearson's correlation, as a local module of `evaluate`: works without the hub."""

import datasets
import evaluate
import numpy as np


class Pearsonr(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Pearson's correlation of predictions and references; 0 where either is constant.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references):
        if np.std(predictions) == 0 or np.std(references) == 0:
            return {"pearsonr": 0.0}
        return {"pearsonr": float(np.corrcoef(predictions, references)[0, 1])}
