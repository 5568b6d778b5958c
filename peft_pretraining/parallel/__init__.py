"""Process group, DistributedDataParallel and fully sharded training."""
