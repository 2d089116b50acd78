"""Recipes: functions that return complete configs, each with its command, time and score."""

from collections.abc import Callable
from dataclasses import replace

from vlbeit.config import (
    BatchConfig,
    ClassificationConfig,
    ClassificationRun,
    CropConfig,
    EntailmentRun,
    FinetuneConfig,
    FinetuneOptimConfig,
    InputConfig,
    LogConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    RandAugmentConfig,
    RetrievalConfig,
    RetrievalRun,
    SegmentationConfig,
    SegmentationRun,
    StatementsRun,
    TaskBatchConfig,
    TaskInputConfig,
    TextTokenizerConfig,
    TokenizersConfig,
    VisualTokenizerConfig,
    VqaConfig,
    VqaRun,
)


def tiny() -> PretrainConfig:
    """A model for the drawn world (`vlbeit prepare scenes`): 1.7 M parameters, two CPU cores.

    vlbeit pretrain tiny --data DIR --run-dir RUN
    """
    return PretrainConfig(
        recipe="tiny",
        run_dir="runs/tiny",
        max_steps=2_200,
        save_every=500,
        model=ModelConfig(
            width=128,
            layers=4,
            heads=4,
            ffn=512,
            vl_layers=1,
            image_size=(40, 40),
            patch=8,
            vocab=512,
            codes=256,
            text_positions=48,
            layer_scale=0.0,
            drop_path=0.0,
            init_std=0.05,
            position_std=0.5,
        ),
        input=InputConfig(
            images=CropConfig(scale=(0.6, 1.0), flip=0.5, jitter=0.0),
            # Captions name places, sizes and colours: the picture stays as it is.
            pairs=CropConfig(scale=(1.0, 1.0), flip=0.0, jitter=0.0),
            text_length=48,
            pair_text_length=40,
        ),
        batch=BatchConfig(images=16, texts=8, pairs=64, micro=64),
        masking=MaskingConfig(min_block=2),
        # A word of the small text batch would weigh six times a word of the pairs, and most of
        # what it asks cannot be known. At weight 1 looking is learned much later (notebook).
        objective=ObjectiveConfig(mlm=0.1, mim=0.1, mvlm_image=0.1),
        optim=OptimConfig(lr=8e-4, betas=(0.9, 0.98), warmup_steps=60, total_steps=2_200),
        log=LogConfig(print_every=50, eval_every=250),
        tokenizers=TokenizersConfig(
            train_text=TextTokenizerConfig(kind="wordpiece", vocab=512, lowercase=True),
            train_visual=VisualTokenizerConfig(
                codes=256,
                image_size=(40, 40),
                patch=8,
                width=96,
                layers=2,
                heads=4,
                ffn=192,
                decoder_layers=1,
                # A short run: the codebook must move, and unused codes come back, faster than
                # in BEiT v2's hundred epochs.
                decay=0.97,
                revive_below=0.1,
                crop=CropConfig(scale=(0.6, 1.0), flip=0.5, jitter=0.0),
                batch=32,
                lr=4e-3,
                warmup_steps=100,
                total_steps=700,
            ),
        ),
    )


def small() -> PretrainConfig:
    """A model for some ten thousand photos: 96 px, 64 patches; hours on a CPU.

    vlbeit pretrain small --data PAIRS IMAGES TEXT --run-dir RUN
    """
    return PretrainConfig(
        recipe="small",
        run_dir="runs/small",
        max_steps=3_000,
        save_every=500,
        precision="bf16",
        model=ModelConfig(
            width=256,
            layers=6,
            heads=4,
            ffn=1024,
            vl_layers=2,
            image_size=(96, 96),
            patch=12,
            vocab=8192,
            codes=1024,
            text_positions=128,
            layer_scale=0.0,
            drop_path=0.0,
            init_std=0.035,
            position_std=0.3,
        ),
        input=InputConfig(
            images=CropConfig(scale=(0.3, 1.0), jitter=0.2),
            pairs=CropConfig(scale=(0.6, 1.0), flip=0.5, jitter=0.1),
            images_from_pairs=True,
            text_length=128,
            pair_text_length=40,
        ),
        batch=BatchConfig(images=32, texts=16, pairs=64, micro=64),
        masking=MaskingConfig(min_block=6),
        objective=ObjectiveConfig(mlm=0.3, mim=0.3, mvlm_image=0.3),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.98), warmup_steps=200, total_steps=3_000),
        log=LogConfig(print_every=50, eval_every=250),
        tokenizers=TokenizersConfig(
            train_text=TextTokenizerConfig(kind="wordpiece", vocab=8192, lowercase=True),
            train_visual=VisualTokenizerConfig(
                codes=1024,
                image_size=(96, 96),
                patch=12,
                width=192,
                layers=3,
                heads=6,
                ffn=768,
                decoder_layers=1,
                crop=CropConfig(scale=(0.3, 1.0), jitter=0.0),
                batch=64,
                lr=5e-4,
                warmup_steps=100,
                total_steps=2_000,
            ),
        ),
    )


def base() -> PretrainConfig:
    """The paper's model and numbers (section 3.1); where it is silent, BEiT's and VLMo's.

    torchrun --nproc-per-node 8 -m vlbeit pretrain base --data IMAGENET22K TEXT COCO VG CC3M SBU

    Not run at this size by us. `vlbeit bench plan` says 51 hours on eight H200 at half of the 790
    TFLOP/s of their matrix products: 480k steps of 1,198 TFLOP, 144 of them the visual
    tokenizer's. One view a pair, captions of 40 tokens and stored codes make it 31 hours.
    """
    return PretrainConfig(recipe="base", run_dir="runs/base")


def large() -> PretrainConfig:
    """BEiT-large's trunk with VLMo-large's three layers of VL-experts; data and batch as `base`.

    torchrun --nproc-per-node 8 -m vlbeit pretrain large --data IMAGENET22K TEXT COCO VG CC3M SBU

    The paper has no large model: width, depth and LayerScale 1e-5 are BEiT's, vl_layers VLMo's,
    drop path and rate as `base`. Not run by us.
    """
    return PretrainConfig(
        recipe="large",
        run_dir="runs/large",
        model=ModelConfig(width=1024, layers=24, heads=16, ffn=4096, vl_layers=3, layer_scale=1e-5),
    )


PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    "tiny": tiny,
    "small": small,
    "base": base,
    "large": large,
}


# Fine-tuning. A recipe's model is that of the pretraining recipe of the same name, with the
# task's picture size and drop path; a run takes the rest from its --start.


def tiny_classification() -> FinetuneConfig:
    """Texture and shape of a drawn scene (15 classes).

    vlbeit finetune classification tiny --start RUN --data DIR --run-dir RUN
    """
    steps = 500
    return ClassificationRun(
        recipe="tiny",
        run_dir="runs/tiny-classification",
        max_steps=steps,
        save_every=250,
        precision="bf16",
        model=tiny().model,
        # A flip leaves texture and shape as they are. No crop: it would move the figures off the
        # grid of patches they are drawn on, and with crops (0.6, 1) 600 steps reached 58 % where
        # 100 steps without reached 88 %.
        input=TaskInputConfig(crop=CropConfig(scale=(1.0, 1.0), flip=0.5, jitter=0.0)),
        batch=TaskBatchConfig(size=64, micro=64),
        optim=FinetuneOptimConfig(lr=2e-3, betas=(0.9, 0.98), warmup_steps=30, total_steps=steps),
        log=LogConfig(print_every=50, eval_every=250),
        classification=ClassificationConfig(label_smoothing=0.0),
    )


def small_classification() -> FinetuneConfig:
    """Some thousand photos at 96 px (Imagenette); BEiT's augmentation, fewer steps.

    vlbeit finetune classification small --start RUN --data DIR --run-dir RUN
    """
    steps = 2_000
    return ClassificationRun(
        recipe="small",
        run_dir="runs/small-classification",
        max_steps=steps,
        save_every=500,
        model=replace(small().model, drop_path=0.1),
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.3, 1.0), flip=0.5, jitter=0.0),
            rand_augment=RandAugmentConfig(operations=2, magnitude=7.0),
        ),
        batch=TaskBatchConfig(size=64, micro=64),
        optim=FinetuneOptimConfig(
            lr=1e-3, min_lr=1e-6, layer_decay=0.75, warmup_steps=200, total_steps=steps
        ),
        log=LogConfig(print_every=50, eval_every=500),
        classification=ClassificationConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
    )


def base_classification() -> FinetuneConfig:
    """ImageNet-1K from self-supervised weights, without the 22K stage.

    torchrun --nproc-per-node 8 -m -- vlbeit finetune classification base --start RUN --data DATA

    No numbers in the paper; these are BEiT's (docs/paper.md 5, fallback "without stage 1"): batch
    1024, lr 4e-3, 100 epochs (1,251 steps each) with 20 of warmup, layer decay 0.65, drop path
    0.1, weight decay 0.05, clip 3, mixup 0.8, CutMix 1.0, label smoothing 0.1, RandAugment
    m9-mstd0.5, erasing 0.25. With the 22K stage (its stage 2): --batch.size 512 --optim.lr 2e-5
    --optim.layer-decay 0.85 --optim.weight-decay 1e-8 --classification.mixup 0
    --classification.cutmix 0, 30 epochs, 5 of warmup. Not run by us.
    """
    epoch = 1_251
    return ClassificationRun(
        recipe="base",
        run_dir="runs/base-classification",
        max_steps=100 * epoch,
        save_every=4 * epoch,
        model=replace(base().model, image_size=(224, 224), drop_path=0.1),
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.08, 1.0), flip=0.5, jitter=0.0),
            rand_augment=RandAugmentConfig(operations=2, magnitude=9.0, spread=0.5),
        ),
        batch=TaskBatchConfig(size=1024, micro=128),
        optim=FinetuneOptimConfig(
            lr=4e-3,
            min_lr=1e-6,
            weight_decay=0.05,
            layer_decay=0.65,
            clip=3.0,
            warmup_steps=20 * epoch,
            total_steps=100 * epoch,
        ),
        log=LogConfig(eval_every=4 * epoch, eval_samples=5_000),
        classification=ClassificationConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0, erase=0.25),
    )


def tiny_vqa() -> FinetuneConfig:
    """Questions about a drawn scene: 94 % right (docs/results.md).

    vlbeit finetune vqa tiny --start RUN --data DIR --run-dir RUN
    """
    steps = 1_700
    return VqaRun(
        recipe="tiny",
        run_dir="runs/tiny-vqa",
        max_steps=steps,
        save_every=500,
        precision="bf16",
        model=tiny().model,
        # Questions name places, sizes and colours: the picture stays as it is.
        input=TaskInputConfig(text_length=40),
        batch=TaskBatchConfig(size=128, micro=128),
        # At the pretraining's rate the trunk forgets shapes and places before the head reads them.
        # "Is there ..." stays at chance for some hundred steps, the longer the higher the rate is
        # (8e-4: all of 1,000) and the fewer such questions a step holds (docs/notebook.md).
        optim=FinetuneOptimConfig(
            lr=2e-4,
            min_lr=2e-5,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup_steps=60,
            total_steps=steps,
            head_lr=4.0,
        ),
        log=LogConfig(print_every=50, eval_every=500),
    )


def small_vqa() -> FinetuneConfig:
    """Questions about photos at 96 px (DAQUAR), or about drawings (easy_vqa).

    vlbeit finetune vqa small --start RUN --data DIR --run-dir RUN
    """
    steps = 2_000
    return VqaRun(
        recipe="small",
        run_dir="runs/small-vqa",
        max_steps=steps,
        save_every=500,
        model=replace(small().model, drop_path=0.1),
        # No flip: some questions say left and right.
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.8, 1.0), flip=0.0, jitter=0.0), text_length=40
        ),
        batch=TaskBatchConfig(size=64, micro=64),
        optim=FinetuneOptimConfig(
            lr=3e-4,
            min_lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup_steps=200,
            total_steps=steps,
            schedule="linear",
            head_lr=5.0,
        ),
        log=LogConfig(print_every=50, eval_every=500),
        vqa=VqaConfig(min_count=3),
    )


def base_vqa() -> FinetuneConfig:
    """VQAv2 at the paper's 480 px (section 3.2).

    torchrun --nproc-per-node 8 -m -- vlbeit finetune vqa base --start RUN --data VQAV2

    No more numbers in the paper; these are VLMo's (docs/paper.md 5): lr 3e-5, the head's 20 times
    that, batch 128, 10 epochs (about 5,000 steps each: train + val, 640k questions) with 10 %
    warmup, linear to 0, AdamW (0.9, 0.98), weight decay 0.01, drop path 0.15, 40 words,
    RandAugment(2, 7) with crop (0.5, 1) and flip, 3,129 answers by the rule of 9. Not run by us.
    """
    steps = 50_000
    return VqaRun(
        recipe="base",
        run_dir="runs/base-vqa",
        max_steps=steps,
        save_every=2_500,
        model=replace(base().model, image_size=(480, 480), drop_path=0.15),
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.5, 1.0), flip=0.5, jitter=0.0),
            rand_augment=RandAugmentConfig(operations=2, magnitude=7.0, spread=0.0),
            text_length=40,
        ),
        batch=TaskBatchConfig(size=128, micro=16),
        optim=FinetuneOptimConfig(
            lr=3e-5,
            min_lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            clip=0.0,
            warmup_steps=steps // 10,
            total_steps=steps,
            schedule="linear",
            head_lr=20.0,
        ),
        log=LogConfig(eval_every=2_500, eval_samples=5_000),
        vqa=VqaConfig(min_count=9),
    )


def tiny_retrieval() -> FinetuneConfig:
    """Drawn scenes and their complete captions: R@1 93 % among 500 in a minute and a half.

    vlbeit finetune retrieval tiny --start RUN --data DIR --run-dir RUN
    """
    steps = 300
    return RetrievalRun(
        recipe="tiny",
        run_dir="runs/tiny-retrieval",
        max_steps=steps,
        save_every=200,
        precision="bf16",
        model=tiny().model,
        # Captions name places, sizes and colours: the picture stays as it is.
        input=TaskInputConfig(text_length=40),
        batch=TaskBatchConfig(size=64, micro=64),
        optim=FinetuneOptimConfig(
            lr=8e-4, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=30, total_steps=steps
        ),
        log=LogConfig(print_every=50, eval_every=200),
        retrieval=RetrievalConfig(rerank=16),
    )


def small_retrieval() -> FinetuneConfig:
    """Some thousand photos with captions at 96 px (Flickr8k).

    vlbeit finetune retrieval small --start RUN --data DIR --run-dir RUN
    """
    steps = 2_000
    return RetrievalRun(
        recipe="small",
        run_dir="runs/small-retrieval",
        max_steps=steps,
        save_every=500,
        model=replace(small().model, drop_path=0.1),
        # A flip: photos seldom show what left and right in a caption mean (ALBEF flips too).
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.6, 1.0), flip=0.5, jitter=0.0), text_length=40
        ),
        batch=TaskBatchConfig(size=128, micro=128),
        optim=FinetuneOptimConfig(
            lr=3e-4,
            min_lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup_steps=200,
            total_steps=steps,
            schedule="linear",
        ),
        log=LogConfig(print_every=50, eval_every=500),
        retrieval=RetrievalConfig(rerank=32),
    )


def base_retrieval() -> FinetuneConfig:
    """COCO at the paper's 384 px (section 3.2).

    torchrun --nproc-per-node 64 -m -- vlbeit finetune retrieval base --start RUN --data COCO

    No more numbers in the paper; these are VLMo's (docs/paper.md 5): batch 3,072, lr 3e-5, 3,000
    steps with 300 of warmup, linear to 0, weight decay 0.01, drop path 0.2, 40 words, k = 32 and
    the sum of both scores. Flickr30K: --start the COCO run, --max-steps 1500 --optim.total-steps
    1500 --optim.warmup-steps 150 --model.drop-path 0.15. A text is compared with the images of one
    micro-batch of all ranks: 64 ranks of 48 see the whole batch, as the peers do; fewer ranks see
    fewer rivals. Not run by us.
    """
    steps = 3_000
    return RetrievalRun(
        recipe="base",
        run_dir="runs/base-retrieval",
        max_steps=steps,
        save_every=500,
        model=replace(base().model, image_size=(384, 384), drop_path=0.2),
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.5, 1.0), flip=0.5, jitter=0.0),
            rand_augment=RandAugmentConfig(operations=2, magnitude=7.0, spread=0.0),
            text_length=40,
        ),
        batch=TaskBatchConfig(size=3072, micro=48),
        optim=FinetuneOptimConfig(
            lr=3e-5,
            min_lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            clip=0.0,
            warmup_steps=steps // 10,
            total_steps=steps,
            schedule="linear",
        ),
        log=LogConfig(eval_every=500, eval_samples=5_000),
        retrieval=RetrievalConfig(rerank=32),
    )


def tiny_statements() -> FinetuneConfig:
    """Statements about two drawn scenes, from a run of VQA: 97 % right (docs/results.md). From
    pretraining, 64 % were after 1,200 steps ("more figures" 100 %, the other kinds at chance).

    vlbeit finetune statements tiny --start VQA_RUN --data DIR --run-dir RUN
    """
    steps = 1_200
    return StatementsRun(
        recipe="tiny",
        run_dir="runs/tiny-statements",
        max_steps=steps,
        save_every=500,
        precision="bf16",
        model=tiny().model,
        # Statements name places, sizes and colours: the pictures stay as they are.
        input=TaskInputConfig(text_length=40),
        batch=TaskBatchConfig(size=64, micro=64),
        optim=FinetuneOptimConfig(
            lr=2e-4,
            min_lr=2e-5,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup_steps=60,
            total_steps=steps,
            head_lr=4.0,
        ),
        log=LogConfig(print_every=50, eval_every=500),
    )


def small_statements() -> FinetuneConfig:
    """Statements about two pictures at 96 px (NLVR's boxes, pairs of photos).

    vlbeit finetune statements small --start RUN --data DIR --run-dir RUN
    """
    steps = 2_000
    return StatementsRun(
        recipe="small",
        run_dir="runs/small-statements",
        max_steps=steps,
        save_every=500,
        model=replace(small().model, drop_path=0.1),
        input=TaskInputConfig(text_length=48),
        batch=TaskBatchConfig(size=32, micro=32),
        optim=FinetuneOptimConfig(
            lr=3e-4,
            min_lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            warmup_steps=200,
            total_steps=steps,
            schedule="linear",
        ),
        log=LogConfig(print_every=50, eval_every=500),
    )


def base_statements() -> FinetuneConfig:
    """NLVR2 at the paper's 384 px (section 3.2).

    torchrun --nproc-per-node 8 -m -- vlbeit finetune statements base --start RUN --data NLVR2

    No more numbers in the paper; these are VLMo's (docs/paper.md 5): lr 5e-5, batch 128, 10 epochs
    (675 steps each: 86,373 statements) with 10 % warmup, linear to 0, AdamW (0.9, 0.98), weight
    decay 0.01, drop path 0.1, 40 words, and its crop, flip and RandAugment(2, 7) as for VQA. Not
    run by us.
    """
    epoch = 675
    return StatementsRun(
        recipe="base",
        run_dir="runs/base-statements",
        max_steps=10 * epoch,
        save_every=epoch,
        model=replace(base().model, image_size=(384, 384), drop_path=0.1),
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.5, 1.0), flip=0.5, jitter=0.0),
            rand_augment=RandAugmentConfig(operations=2, magnitude=7.0, spread=0.0),
            text_length=40,
        ),
        batch=TaskBatchConfig(size=128, micro=16),
        optim=FinetuneOptimConfig(
            lr=5e-5,
            min_lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            clip=0.0,
            warmup_steps=epoch,
            total_steps=10 * epoch,
            schedule="linear",
        ),
        log=LogConfig(eval_every=epoch, eval_samples=7_000),
    )


def tiny_entailment() -> FinetuneConfig:
    """Sentences about pictures of 40 px; the drawn world has none of its own.

    vlbeit finetune entailment tiny --start RUN --data DIR --run-dir RUN
    """
    config = tiny_statements()
    return EntailmentRun(
        recipe="tiny",
        run_dir="runs/tiny-entailment",
        max_steps=600,
        save_every=200,
        model=config.model,
        input=config.input,
        batch=TaskBatchConfig(size=64, micro=64),
        optim=replace(config.optim, warmup_steps=30, total_steps=600),
        log=LogConfig(print_every=50, eval_every=200),
    )


def small_entailment() -> FinetuneConfig:
    """Some thousand sentences about photos at 96 px (SNLI-VE's part on Flickr8k).

    vlbeit finetune entailment small --start RUN --data DIR --run-dir RUN
    """
    config = small_statements()
    return EntailmentRun(
        recipe="small",
        run_dir="runs/small-entailment",
        max_steps=1_000,
        save_every=250,
        model=config.model,
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.6, 1.0), flip=0.5, jitter=0.0), text_length=40
        ),
        batch=TaskBatchConfig(size=64, micro=64),
        optim=replace(config.optim, warmup_steps=100, total_steps=1_000),
        log=LogConfig(print_every=50, eval_every=250),
    )


def base_entailment() -> FinetuneConfig:
    """SNLI-VE at 384 px; the paper does not have this task.

    torchrun --nproc-per-node 8 -m -- vlbeit finetune entailment base --start RUN --data SNLIVE

    ALBEF's numbers (configs/VE.yaml): lr 2e-5, cosine to 1e-6, batch 32 on each of 8 GPUs, 5
    epochs (2,069 steps each: 529,527 sentences) with one of warmup, weight decay 0.02. Drop path
    and text length as for NLVR2. Not run by us.
    """
    epoch = 2_069
    return EntailmentRun(
        recipe="base",
        run_dir="runs/base-entailment",
        max_steps=5 * epoch,
        save_every=epoch,
        model=replace(base().model, image_size=(384, 384), drop_path=0.1),
        input=TaskInputConfig(
            crop=CropConfig(scale=(0.5, 1.0), flip=0.5, jitter=0.0),
            rand_augment=RandAugmentConfig(operations=2, magnitude=7.0, spread=0.0),
            text_length=40,
        ),
        batch=TaskBatchConfig(size=256, micro=32),
        optim=FinetuneOptimConfig(
            lr=2e-5,
            min_lr=1e-6,
            weight_decay=0.02,
            clip=0.0,
            warmup_steps=epoch,
            total_steps=5 * epoch,
        ),
        log=LogConfig(eval_every=epoch, eval_samples=5_000),
    )


def tiny_segmentation() -> FinetuneConfig:
    """Figures of a drawn scene (5 shapes and the ground).

    vlbeit finetune segmentation tiny --start RUN --data DIR --run-dir RUN
    """
    steps = 1_400
    return SegmentationRun(
        recipe="tiny",
        run_dir="runs/tiny-segmentation",
        max_steps=steps,
        save_every=500,
        precision="bf16",
        model=tiny().model,
        # A flip leaves a shape what it is.
        input=TaskInputConfig(crop=CropConfig(scale=(1.0, 1.0), flip=0.5, jitter=0.0)),
        batch=TaskBatchConfig(size=32, micro=32),
        optim=FinetuneOptimConfig(
            lr=5e-4,
            min_lr=3e-5,
            betas=(0.9, 0.98),
            warmup_steps=60,
            total_steps=steps,
            head_lr=4.0,
        ),
        log=LogConfig(print_every=50, eval_every=500),
        segmentation=SegmentationConfig(
            channels=48,
            auxiliary_channels=32,
            scale=(0.9, 1.1),
            max_share=1.0,  # nine tenths of a scene are ground
            inference="whole",
        ),
    )


def small_segmentation() -> FinetuneConfig:
    """Some hundred photos of 144 x 192 px (CamVid), looked at twice as large by windows.

    vlbeit finetune segmentation small --start RUN --data DIR --run-dir RUN
    """
    steps = 1_500
    return SegmentationRun(
        recipe="small",
        run_dir="runs/small-segmentation",
        max_steps=steps,
        save_every=500,
        model=replace(small().model, image_size=(144, 192), drop_path=0.0),
        input=TaskInputConfig(crop=CropConfig(scale=(1.0, 1.0), flip=0.5, jitter=0.2)),
        batch=TaskBatchConfig(size=8, micro=8),
        optim=FinetuneOptimConfig(
            lr=5e-4,
            min_lr=0.0,
            layer_decay=0.9,
            warmup_steps=40,
            total_steps=steps,
            schedule="linear",
            head_lr=4.0,
        ),
        log=LogConfig(print_every=50, eval_every=500, eval_samples=100),
        # At a scale of 1 a patch of 12 pixels is wider than a pole, a sign or a cyclist
        # (docs/notebook.md).
        segmentation=SegmentationConfig(
            channels=96,
            auxiliary_channels=64,
            scale=(1.5, 2.5),
            balance=0.5,
            inference="slide",
            scales=(2.0,),
        ),
    )


def base_segmentation() -> FinetuneConfig:
    """ADE20K by UPerNet, from self-supervised weights without the 22K stage.

    torchrun --nproc-per-node 8 -m -- vlbeit finetune segmentation base --start RUN --data ADE20K

    The paper gives no numbers; these are BEiT's (docs/paper.md 5, "without intermediate tuning"):
    crop 512, 160k steps of 16, lr 7e-4 linear to 0, 1,500 of warmup, layer decay 0.65, weight
    decay 0.05, drop path 0.1, UPerNet of 768 channels, auxiliary head 0.4, scale 0.5 to 2, windows
    every 341 px. After the 22K stage: --optim.lr 3e-5 --optim.layer-decay 0.9. Other than BEiT:
    group norm for batch norm over all GPUs, no dropout in the heads, no change of hue. Not run by
    us.
    """
    return SegmentationRun(
        recipe="base",
        run_dir="runs/base-segmentation",
        max_steps=160_000,
        save_every=8_000,
        model=replace(base().model, image_size=(512, 512), drop_path=0.1),
        input=TaskInputConfig(crop=CropConfig(scale=(1.0, 1.0), flip=0.5, jitter=0.4)),
        batch=TaskBatchConfig(size=16, micro=2),
        optim=FinetuneOptimConfig(
            lr=7e-4,
            min_lr=0.0,
            weight_decay=0.05,
            layer_decay=0.65,
            clip=0.0,
            warmup_steps=1_500,
            total_steps=160_000,
            schedule="linear",
        ),
        log=LogConfig(eval_every=16_000, eval_samples=200),
        segmentation=SegmentationConfig(),
    )


FINETUNE: dict[str, dict[str, Callable[[], FinetuneConfig]]] = {
    "classification": {
        "tiny": tiny_classification,
        "small": small_classification,
        "base": base_classification,
    },
    "vqa": {"tiny": tiny_vqa, "small": small_vqa, "base": base_vqa},
    "retrieval": {
        "tiny": tiny_retrieval,
        "small": small_retrieval,
        "base": base_retrieval,
    },
    "statements": {
        "tiny": tiny_statements,
        "small": small_statements,
        "base": base_statements,
    },
    "entailment": {
        "tiny": tiny_entailment,
        "small": small_entailment,
        "base": base_entailment,
    },
    "segmentation": {
        "tiny": tiny_segmentation,
        "small": small_segmentation,
        "base": base_segmentation,
    },
}
