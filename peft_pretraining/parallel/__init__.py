"""Process group, DistributedDataParallel and fully sharded training.

May import `constants` and `errors`.
"""
