"""What makes parts of a bundle: training of classifiers, external face features."""
