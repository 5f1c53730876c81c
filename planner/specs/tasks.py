"""Tasks of ``source: transformers``: the AutoModelFor* family under the names that specs use.

The list is that of ``transformers/models/auto/modeling_auto.py`` of transformers 5.17 (a test compares them). Whether a
model type has a model for a task is the library's to say, when the model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from planner.specs.model import DataKind

AUTO_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "audio-classification": "AutoModelForAudioClassification",
        "audio-frame-classification": "AutoModelForAudioFrameClassification",
        "audio-tokenization": "AutoModelForAudioTokenization",
        "audio-xvector": "AutoModelForAudioXVector",
        "causal-lm": "AutoModelForCausalLM",
        "ctc": "AutoModelForCTC",
        "depth-estimation": "AutoModelForDepthEstimation",
        "document-question-answering": "AutoModelForDocumentQuestionAnswering",
        "image-classification": "AutoModelForImageClassification",
        "image-matting": "AutoModelForImageMatting",
        "image-segmentation": "AutoModelForImageSegmentation",
        "image-text-to-text": "AutoModelForImageTextToText",
        "image-to-image": "AutoModelForImageToImage",
        "instance-segmentation": "AutoModelForInstanceSegmentation",
        "keypoint-detection": "AutoModelForKeypointDetection",
        "keypoint-matching": "AutoModelForKeypointMatching",
        "mask-generation": "AutoModelForMaskGeneration",
        "masked-image-modeling": "AutoModelForMaskedImageModeling",
        "masked-lm": "AutoModelForMaskedLM",
        "multimodal-lm": "AutoModelForMultimodalLM",
        "multiple-choice": "AutoModelForMultipleChoice",
        "next-sentence-prediction": "AutoModelForNextSentencePrediction",
        "normal-estimation": "AutoModelForNormalEstimation",
        "object-detection": "AutoModelForObjectDetection",
        "pointmap-estimation": "AutoModelForPointmapEstimation",
        "pose-estimation": "AutoModelForPoseEstimation",
        "pretraining": "AutoModelForPreTraining",
        "question-answering": "AutoModelForQuestionAnswering",
        "rnnt": "AutoModelForRNNT",
        "semantic-segmentation": "AutoModelForSemanticSegmentation",
        "seq2seq-lm": "AutoModelForSeq2SeqLM",
        "sequence-classification": "AutoModelForSequenceClassification",
        "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
        "table-question-answering": "AutoModelForTableQuestionAnswering",
        "table-recognition": "AutoModelForTableRecognition",
        "tdt": "AutoModelForTDT",
        "text-encoding": "AutoModelForTextEncoding",
        "text-recognition": "AutoModelForTextRecognition",
        "text-to-spectrogram": "AutoModelForTextToSpectrogram",
        "text-to-waveform": "AutoModelForTextToWaveform",
        "time-series-prediction": "AutoModelForTimeSeriesPrediction",
        "token-classification": "AutoModelForTokenClassification",
        "universal-segmentation": "AutoModelForUniversalSegmentation",
        "video-classification": "AutoModelForVideoClassification",
        "visual-question-answering": "AutoModelForVisualQuestionAnswering",
        "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
        "zero-shot-object-detection": "AutoModelForZeroShotObjectDetection",
    }
)
"""Task name -> class of ``transformers``."""

_KINDS: Mapping[str, tuple[DataKind, ...]] = MappingProxyType(
    {
        "causal-lm": (DataKind.TOKENS, DataKind.TENSORS),
        "masked-lm": (DataKind.TOKENS, DataKind.TENSORS),
        "seq2seq-lm": (DataKind.TOKENS, DataKind.TENSORS),
        "token-classification": (DataKind.TOKENS, DataKind.TENSORS),
        "sequence-classification": (DataKind.TOKENS, DataKind.TENSORS),
        "next-sentence-prediction": (DataKind.TOKENS, DataKind.TENSORS),
        "image-classification": (DataKind.IMAGES, DataKind.TENSORS),
    }
)


def data_kinds(task: str) -> tuple[DataKind, ...]:
    """The data kinds that say all that ``task`` needs to compute its own loss: ``tensors`` always does."""
    return _KINDS.get(task, (DataKind.TENSORS,))
