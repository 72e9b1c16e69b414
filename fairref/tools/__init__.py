"""What makes parts of a bundle, classifiers and external face features; and what holds a run back."""
