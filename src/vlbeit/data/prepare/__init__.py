"""`vlbeit prepare`: public data sets' own files, and your own, become records.

The way of a record: `cli` (words; those of tasks in `task_verbs`) -> one file a family (images,
imagenet, pairs, coco, vg, urls; for tasks questions, vqav2, statements, classification,
segmentation, entailment; captions gathers what several rows say about one image), which reads
`rows`, finds images with `locate` and returns a `plan` -> `build` opens every image, asks
`overlap` whether an evaluation uses it, and writes it into the `folder`, while `account` keeps the
books and `blind` counts what can be reached without looking. Two families write without a plan:
text, which has no images, and shards, which exist already.
"""

from vlbeit.data.prepare.cli import main

__all__ = ["main"]
