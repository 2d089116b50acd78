"""What a model knows: held-out scores, the sighted / blind gap, pictures, reports."""
