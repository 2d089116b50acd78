"""Every knob of a run: one tree of frozen dataclasses, standard library only.

A recipe (recipes.py) is a function that returns a complete tree. The command line and a YAML
file change leaves of it; `from_dict` refuses what the tree does not know. The resolved tree is
saved in the run folder and in every checkpoint as config.json.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from vlbeit.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The MoME Transformer and its two heads. Defaults: VL-BEiT base (paper section 3.1)."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    """Hidden width of each expert."""
    vl_layers: int = 2
    """Top layers in which one VL-expert serves all tokens of a pair (VLMo: 2 of 12); 0: none."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels of the training crop; other sizes interpolate positions."""
    patch: int = 16
    vocab: int = 64000
    """Rows of the word table and of the MLM head; the text tokenizer may use fewer."""
    codes: int = 8192
    """Rows of the MIM head; must equal the visual tokenizer's codebook size."""
    text_positions: int = 196
    """Rows of the text position table: the longest text, [T_CLS] and [T_SEP] included."""
    absolute_positions: bool = True
    """Learned absolute positions, one table per modality (paper section 2.1)."""
    relative_bias: Literal["none", "shared", "per_layer"] = "none"
    """Relative position bias with VLMo's rows (image, cross, text)."""
    layer_scale: float = 0.1
    """Start value of LayerScale (BEiT base); 0 builds the model without it."""
    drop_path: float = 0.1
    """Stochastic depth at the last block; rises linearly from 0 at the first."""
    norm_eps: float = 1e-6
    text_norm_eps: float = 0.0
    """eps of a LayerNorm after word and position vectors of a text (BERT, ViLT, VLMo base-plus);
    0 builds the model without it, as the paper."""
    init_std: float = 0.02
    """Standard deviation of fresh weights (BEiT). It is made for a width of 768; `tiny`, 128
    wide, takes 0.05."""
    position_std: float = 0.02
    """The same for the image's position table. In a narrow model strong colours can drown positions
    of 0.02, and with them every word that tells a place (docs/notebook.md)."""


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Augmentation of one stream's images. Defaults: BEiT's (paper section 3.1)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the area that a random crop keeps; (1, 1): the whole image, squashed to size."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where captions say left and right."""
    jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter; 0: off."""

    @property
    def fixed(self) -> bool:
        """Whether every visit of a record shows the same picture: the whole of it, squashed."""
        return self.scale == (1.0, 1.0) and self.flip == 0 and self.jitter == 0


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How records become samples."""

    images: CropConfig = field(default_factory=CropConfig)
    pairs: CropConfig = field(default_factory=CropConfig)
    images_from_pairs: bool = False
    """Let the images of pair sources feed the image stream too."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of a source in its stream, by source name; a source not named counts its records."""
    text_length: int = 196
    """Tokens of a text chunk, [T_CLS] and [T_SEP] included."""
    pair_text_length: int = 64
    """Longest caption in tokens, [T_CLS] and [T_SEP] included; the rest is cut."""
    shuffle_window: int = 4096
    """Records shuffled together after the shards are shuffled; also the window in which
    captions are bucketed by length."""
    skip_budget: float = 0.01
    """Largest share of bad samples before the run stops with exit code 65."""
    workers: int = 0
    """Loader processes a rank; 0 loads in the training process."""
    loader_timeout: float = 60.0
    """Seconds without a batch before a loader counts as lost."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Samples of each stream in one optimizer step, over all ranks (paper: 2048 each)."""

    images: int = 2048
    texts: int = 2048
    pairs: int = 2048
    micro: int = 64
    """Most samples of a stream in one forward pass of one rank."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """What is hidden from the model (paper section 2.3)."""

    text: float = 0.15
    pair_text: float = 0.50
    image: float = 75 / 196
    """Share of patches, block-wise; the count is exact (BEiT: 75 of 196)."""
    min_block: int = 16
    """Fewest patches of one block (BEiT)."""
    max_aspect: float = 1 / 0.3
    """Most elongated block, height over width or its inverse (BEiT)."""
    to_mask: float = 0.8
    """Share of the chosen words replaced by [MASK]."""
    to_random: float = 0.1
    """Share replaced by a random word; the rest stays as it is."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The sum of mean losses that is minimised; a weight of 0 leaves the objective out."""

    mlm: float = 1.0
    mim: float = 1.0
    mvlm_text: float = 1.0
    mvlm_image: float = 1.0
    mvlm: Literal["two_views", "half", "joint"] = "two_views"
    """two_views: each pair twice, one modality masked in each (Figure 1c). half: each pair once,
    its views alternating. joint: each pair once, both modalities masked."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. Defaults: paper section 3.1; eps, clip and min_lr from BEiT."""

    lr: float = 2e-3
    min_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Not applied to biases, norms, gains, positions, [CLS] and mask vectors."""
    layer_decay: float = 1.0
    """Learning-rate factor from one layer to the one below; 1: the same rate everywhere."""
    clip: float = 3.0
    """Largest global gradient norm; 0: no clipping."""
    warmup_steps: int = 10_000
    total_steps: int = 480_000
    """Length of the schedule. `max_steps` may stop a run earlier without changing it."""
    schedule: Literal["cosine", "linear"] = "cosine"
    nonfinite_limit: int = 3
    """Steps in a row skipped for a non-finite gradient before exit code 70."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """Training of a subword vocabulary."""

    kind: Literal["unigram", "wordpiece"] = "unigram"
    vocab: int = 64000
    """Size of the vocabulary, special tokens included."""
    lowercase: bool = False


@dataclass(frozen=True, kw_only=True)
class VisualTokenizerConfig:
    """VQ-KD: a ViT encoder, a cosine codebook with EMA, a decoder to a teacher's features.

    Defaults: BEiT v2's base tokenizer (docs/paper.md 1).
    """

    codes: int = 8192
    code_width: int = 32
    image_size: tuple[int, int] = (224, 224)
    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    decoder_layers: int = 3
    teacher: str = "pixels"
    """"pixels", "efficientnet-lite0" (the `teacher` extra), a folder with a ViT in the layout of
    `transformers` (tokens/teachers.py), or "random": the encoder stays as drawn."""
    decay: float = 0.99
    """EMA decay of the codebook."""
    commitment: float = 1.0
    kmeans_iterations: int = 10
    """Start the codebook by k-means over this many iterations; 0: random unit vectors."""
    revive_below: float = 0.01
    """A code used less than this share of the mean use is restarted from the batch; 0: never."""
    pixel_loss: float = 1.0
    """Weight of the pixel decoder that shows what a code means (it does not train the codes when
    the teacher is not "pixels")."""
    crop: CropConfig = field(default_factory=lambda: CropConfig(scale=(0.08, 1.0), jitter=0.0))
    batch: int = 512
    lr: float = 2e-4
    min_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip: float = 3.0
    warmup_steps: int = 25_000
    total_steps: int = 250_000
    """100 epochs of ImageNet-1K at batch 512."""


@dataclass(frozen=True, kw_only=True)
class TokenizersConfig:
    """Where the two tokenizers come from.

    An empty path means: the one that lies in the data folder (`tokenizer.json`, `visual/`), and
    if there is none, train it on this run's data before the first step, by the settings below,
    into the run folder.
    """

    text: str = ""
    visual: str = ""
    codes: str = ""
    """A folder of `vlbeit tokenizer encode`: streams with fixed crops take their codes from it
    instead of asking the visual tokenizer at every visit."""
    train_text: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    train_visual: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run writes down, how often, and how many checkpoints it keeps."""

    every: int = 1
    """Steps between two rows of metrics.jsonl."""
    print_every: int = 20
    """Steps between two lines on the terminal."""
    eval_every: int = 5_000
    """Steps between two evaluations on held-out samples (rows of eval.jsonl); 0: none."""
    eval_samples: int = 256
    """Held-out samples of each stream in such an evaluation."""
    ledger: Literal["full", "digest"] = "full"
    """Whether ledger.jsonl holds every sample id of a step or one sha256 of them per source."""
    tensorboard: bool = False
    """Write the rows of metrics.jsonl and eval.jsonl as event files too, to RUN/tensorboard (needs
    the `train` extra)."""
    keep: int = 3
    """Checkpoints kept; the oldest is removed after a newer one is verified. 0: all."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the machine is used; none of it changes what is learned, but for rounding."""

    threads: int = 0
    """CPU threads a rank; 0: cores divided by ranks on this host."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: less memory, about 1.3 x the time."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block. auto: on a GPU; on a CPU it takes minutes and gains nothing."""
    step_timeout: float = 600.0
    """Seconds a rank waits for the others before it gives up with exit code 71."""
    sharding: Literal["none", "full"] = "none"
    """full: every rank keeps a share of the weights, gradients and optimizer state (FSDP2) and
    asks the others for a block's weights when its turn comes; none: every rank keeps all."""
    exact: int = 0
    """Parts of a step (a power of two) whose gradients are added in a fixed order: the weights are
    bit-equal on 1, 2, 4 ... up to that many ranks. 0: off, equal up to rounding."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run."""

    recipe: str
    run_dir: str = "runs/pretrain"
    """Run folder; the same command on a folder that holds checkpoints goes on from the newest."""
    data: tuple[str, ...] = ()
    """Prepared data folders (`vlbeit prepare`)."""
    seed: int = 0
    max_steps: int = 480_000
    """Stop after this step; the learning-rate schedule keeps its own length."""
    save_every: int = 5_000
    """Steps between two checkpoints; the last step is always saved."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    model: ModelConfig = field(default_factory=ModelConfig)
    input: InputConfig = field(default_factory=InputConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tokenizers: TokenizersConfig = field(default_factory=TokenizersConfig)
    log: LogConfig = field(default_factory=LogConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """RandAugment on the training pictures (data/randaugment.py)."""

    operations: int = 0
    """Operations a picture, each drawn from the same list; 0: off."""
    magnitude: float = 9.0
    """Their strength, 0 to 10."""
    spread: float = 0.5
    """Standard deviation of the strength from picture to picture (timm's "mstd")."""


@dataclass(frozen=True, kw_only=True)
class TaskInputConfig:
    """How a task's records become training samples; evaluation takes whole pictures, squashed."""

    crop: CropConfig = field(
        default_factory=lambda: CropConfig(scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    )
    rand_augment: RandAugmentConfig = field(default_factory=RandAugmentConfig)
    text_length: int = 0
    """Longest text in tokens, [T_CLS] and [T_SEP] included; 0 where the task has no text."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of a source, by source name; a source not named counts its samples."""
    shuffle_window: int = 4096
    """Records shuffled together after the shards are shuffled, with all their samples."""
    skip_budget: float = 0.01
    workers: int = 0
    loader_timeout: float = 60.0


@dataclass(frozen=True, kw_only=True)
class TaskBatchConfig:
    """Samples of one optimizer step, over all ranks."""

    size: int = 128
    micro: int = 64
    """Most samples in one forward pass of one rank."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """OptimConfig, and what only fine-tuning has."""

    head_lr: float = 1.0
    """Learning rate of the fresh head as a multiple of `lr`."""
    ema: float = 0.0
    """Decay of the running mean of the weights that is saved as the model; 0: the weights of the
    last step are."""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Image classification (docs/paper.md 5)."""

    label_smoothing: float = 0.1
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix's; with both on, each picture draws one of the two."""
    erase: float = 0.0
    """Probability that a rectangle of a training picture is filled with noise."""
    probe: bool = False
    """Linear probe: the trunk stays as it is, only the head learns."""


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """Visual question answering as classification over a list of answers (docs/paper.md 5)."""

    answers: str = ""
    """File with the answers, a JSON list or one a line, in the order of the classes; empty: the
    list that dataset.json names, and if it names none, by `min_count` from the training data."""
    min_count: int = 9
    """An answer that the list is built from is the main one of at least this many questions."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Image-text retrieval: contrast, matching with hard negatives, reranking (docs/paper.md 5)."""

    repeated: Literal["positives", "masked"] = "positives"
    """Captions of one image that meet in a batch: all are right (ALBEF), or only the pair's own
    is and the others are left out."""
    matching: float = 1.0
    """Weight of the matching loss beside the contrast; 0: a dual encoder alone (VLMo's public
    fine-tuning)."""
    hardness: float = 1.0
    """How much likelier a pair that the dual encoder finds alike is drawn as a wrong one for the
    matching: the power of its softmax. 1: ALBEF, VLMo; 0: any other image of the micro-batch
    alike, for a dual encoder too weak to tell its own hard ones apart."""
    rerank: int = 32
    """How many of the dual encoder's nearest the fused pass looks at again in `vlbeit eval`; 0:
    none. VLMo: 32; ALBEF: 128 on Flickr30K, 256 on COCO."""
    rule: Literal["sum", "matching"] = "sum"
    """The score after the second look: similarity plus matching logit (VLMo), or the matching
    logit alone (ALBEF)."""


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Semantic segmentation by UPerNet (docs/paper.md 5). Defaults: BEiT's on ADE20K, but `norm`.

    Training crops have the size of `model.image_size`, and so have the windows of evaluation.
    """

    channels: int = 768
    """Inside UPerNet's head."""
    auxiliary: float = 0.4
    """Weight of the auxiliary head's loss; 0: no such head."""
    auxiliary_channels: int = 256
    norm: Literal["batch", "group"] = "group"
    """What follows a convolution. BEiT: batch norm over all GPUs. group: one picture at a time, so
    that micro-batches change nothing."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Size of a training picture before it is cut, uniform in this range; at 1 its shorter side is
    that of the crop."""
    taps: tuple[int, ...] = ()
    """The four blocks (1 = the first) after which the head reads the trunk; none: after a third, a
    half, two thirds and all of them (BEiT: 4, 6, 8, 12)."""
    max_share: float = 0.75
    """A crop of which one class takes more than this share is drawn again, at most ten times;
    1: never."""
    balance: float = 0.0
    """How far the loss weighs rare classes up, from 0 (every pixel alike) to 1 (median frequency
    balancing, Eigen & Fergus 2015; SegNet on CamVid): a weight is (median frequency / that of the
    class) to this power. The mean weight of training's pixels stays 1."""
    inference: Literal["whole", "slide"] = "slide"
    """Evaluation in one pass over the picture, or by windows that overlap."""
    stride: float = 2 / 3
    """From one window to the next, as a share of the window (BEiT: 341 of 512)."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which a picture is evaluated (BEiT's multi-scale: .5, .75, 1, 1.25, 1.5, 1.75)."""
    flip: bool = False
    """Evaluate the mirror image too."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One fine-tuning run. A task's own class (FINETUNE_CONFIGS) adds its one group of settings,
    if it has any."""

    recipe: str
    task: str
    start: str = ""
    """Run folder or checkpoint that the trunk and the text tokenizer come from."""
    scratch: bool = False
    """Same model and tokenizer as `start`, but fresh weights: what pretraining is compared with."""
    run_dir: str = "runs/finetune"
    """Run folder; the same command on a folder that holds checkpoints goes on from the newest."""
    data: tuple[str, ...] = ()
    """Prepared data folders (`vlbeit prepare`)."""
    seed: int = 0
    max_steps: int = 1_000
    save_every: int = 500
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    model: ModelConfig = field(default_factory=ModelConfig)
    """That of `start`; a run sets image_size, drop_path and text_positions only."""
    input: TaskInputConfig = field(default_factory=TaskInputConfig)
    batch: TaskBatchConfig = field(default_factory=TaskBatchConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, kw_only=True)
class ClassificationRun(FinetuneConfig):
    task: Literal["classification"] = "classification"
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)


@dataclass(frozen=True, kw_only=True)
class VqaRun(FinetuneConfig):
    task: Literal["vqa"] = "vqa"
    vqa: VqaConfig = field(default_factory=VqaConfig)


@dataclass(frozen=True, kw_only=True)
class RetrievalRun(FinetuneConfig):
    task: Literal["retrieval"] = "retrieval"
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)


@dataclass(frozen=True, kw_only=True)
class StatementsRun(FinetuneConfig):
    task: Literal["statements"] = "statements"


@dataclass(frozen=True, kw_only=True)
class EntailmentRun(FinetuneConfig):
    task: Literal["entailment"] = "entailment"


@dataclass(frozen=True, kw_only=True)
class SegmentationRun(FinetuneConfig):
    task: Literal["segmentation"] = "segmentation"
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)


FINETUNE_CONFIGS: dict[str, type[FinetuneConfig]] = {
    "classification": ClassificationRun,
    "vqa": VqaRun,
    "retrieval": RetrievalRun,
    "statements": StatementsRun,
    "entailment": EntailmentRun,
    "segmentation": SegmentationRun,
}
"""The config of each task's runs, by the name of the task."""


def finetune_config(tree: Mapping[str, Any]) -> FinetuneConfig:
    """A fine-tuning config from what config.json holds.

    Raises:
        ConfigError: a task, key or value that this version does not know.
    """
    task = tree.get("task")
    if task not in FINETUNE_CONFIGS:
        known = ", ".join(FINETUNE_CONFIGS)
        raise ConfigError(f"task: {task!r} is none of {known}")
    return from_dict(FINETUNE_CONFIGS[task], tree)


@dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig:
    """One run of `vlbeit tokenizer train-visual`."""

    recipe: str
    run_dir: str = "runs/visual-tokenizer"
    data: tuple[str, ...] = ()
    seed: int = 0
    max_steps: int = 250_000
    save_every: int = 5_000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    tokenizer: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)
    input: InputConfig = field(default_factory=InputConfig)
    log: LogConfig = field(default_factory=LogConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """`vlbeit serve`: every limit of the server. docs/serve.md says what each defends against."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that a request may ask for, beside `host` and the loopback names."""
    token: str = ""
    """What a client must show (bearer token, or password of HTTP Basic); empty: nothing."""
    allow_anonymous: bool = False
    """Serve without a token on an address that other machines reach."""
    batch: int = 32
    """Most requests of one mode that go through the model together; 1: one at a time."""
    batch_window: float = 0.0
    """Seconds the model waits for more requests of the mode before a batch that is not full."""
    queue: int = 256
    """Requests that may wait for the model; one more is answered 503."""
    deadline: float = 10.0
    """Seconds from a request's body to its answer; later: 504."""
    receive_seconds: float = 10.0
    """Seconds for the head of a request, for its body, and for an idle connection."""
    send_seconds: float = 30.0
    """Seconds in which a client must take what was sent."""
    drain_seconds: float = 6.0
    """Seconds after SIGTERM in which accepted requests are finished."""
    max_body: int = 10_000_000
    """Bytes of a request's body; more: 413."""
    max_held: int = 128_000_000
    """Bytes of all bodies held at one time, those still arriving included; more: 503."""
    max_pixels: int = 25_000_000
    """Width times height of a picture, checked before it is decoded; more: 413."""
    max_characters: int = 4_000
    """Of a text; more: 413."""
    max_top: int = 100
    """Candidates that a request may ask for."""
    decoders: int = 2
    """Threads that decode pictures: each holds one decoded picture at a time."""


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain dicts, lists, numbers and strings (what config.json holds)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(kind: type[C], values: Mapping[str, Any], *, start: C | None = None) -> C:
    """A config of `kind` from nested mappings; keys left out come from `start` or the defaults.

    Raises:
        ConfigError: a key that does not exist (with its full path and the nearest name), or a
            value of the wrong type.
    """
    return typing.cast(C, _build(kind, values, start, ""))


def _build(kind: Any, values: Any, start: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'}: expected a mapping of settings, found {values!r}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {path}{near[0]}?" if near else ""
            raise ConfigError(f"unknown setting {path}{key}{hint} (known: {', '.join(names)})")
    given: dict[str, Any] = {}
    for name in names:
        old = getattr(start, name) if start is not None else None
        if name in values:
            given[name] = _convert(hints[name], values[name], old, f"{path}{name}")
        elif start is not None:
            given[name] = old
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{path or 'config'}: {error}") from None


def _convert(hint: Any, value: Any, old: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, old, path + ".")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{path}: {value!r} is none of {', '.join(map(repr, args))}")
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(_convert(args[0], v, None, f"{path}.{i}") for i, v in enumerate(value))
            if len(value) == len(args):
                pairs = enumerate(zip(args, value, strict=True))
                return tuple(_convert(a, v, None, f"{path}.{i}") for i, (a, v) in pairs)
            raise ConfigError(f"{path}: expected {len(args)} values, found {len(value)}")
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): _convert(args[1], v, None, f"{path}.{k}") for k, v in value.items()}
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, old, path)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):  # YAML reads 3e-4 as a string
            try:
                return float(value)
            except ValueError:
                pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{path}: expected {wanted}, found {value!r}")


def digest(config: Any) -> str:
    """sha256 of the tree in a canonical form."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
