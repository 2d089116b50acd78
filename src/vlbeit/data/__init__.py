"""From files to masked batches: records, order, streams, collate."""
