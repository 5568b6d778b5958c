"""What main_vit.py needs beside the shared parts: images, their batches, models, accuracy."""
