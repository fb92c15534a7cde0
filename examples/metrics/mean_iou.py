"""Intersection over union of what is answered and what is true, as the metric "mean_iou" of the hub."""

import datasets
import evaluate
import numpy as np


class MeanIoU(evaluate.Metric):
    """Takes maps of class numbers; answers {"mean_iou": float}, the mean over the classes that appear."""

    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(self, predictions, references, num_labels, ignore_index=255):
        both = answered = true = np.zeros(num_labels, dtype=np.int64)
        for prediction, reference in zip(predictions, references, strict=True):
            prediction, reference = np.asarray(prediction), np.asarray(reference)
            counted = reference != ignore_index
            right = reference[counted & (prediction == reference)]
            both = both + np.bincount(right, minlength=num_labels)
            answered = answered + np.bincount(prediction[counted], minlength=num_labels)
            true = true + np.bincount(reference[counted], minlength=num_labels)
        union = answered + true - both
        return {"mean_iou": float(np.mean(both[union > 0] / union[union > 0]))}
