"""The downstream tasks, one file each: head, loss, predictions, metric."""
