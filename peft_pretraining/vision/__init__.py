"""Image classification: datasets, augmentation, timm models, evaluation."""
