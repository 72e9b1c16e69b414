"""Frozen networks that look at pictures. They know no prompt and no fairness."""

# What networks trained on ImageNet subtract from and divide a picture in [0, 1] by, per channel R, G, B.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
