"""Image classification: datasets, augmentation, timm models, evaluation.

The modules may import what lies below: data (order of the samples, DataLoader workers),
checkpoint, parallel and errors.
"""
