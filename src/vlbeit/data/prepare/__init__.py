"""`vlbeit prepare`: public data sets' own files, and your own, become records.

cli      arguments of each verb
rows     JSONL, JSON lists, CSV and TSV, row by row
locate   where the bytes of an image lie: folders and tar archives
build    check every image, write shards, account for what was left out
overlap  evaluation images that are found in the training images
images, imagenet, pairs, coco, vg, urls, text: one file a family
"""

from vlbeit.data.prepare.cli import main

__all__ = ["main"]
