"""The environment variables of torchrun."""


def set_launch(monkeypatch, world_size, rank=0):
    """Set them as on one machine, or remove them for one process."""
    for name in launch_variables(2):
        monkeypatch.delenv(name, raising=False)
    for name, value in launch_variables(world_size, rank).items():
        monkeypatch.setenv(name, value)


def launch_variables(world_size, rank=0):
    """Return {name: value} of the variables that a process of several has."""
    if world_size == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
