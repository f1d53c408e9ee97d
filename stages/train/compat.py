"""Private parts of Ray Train that training relies on."""


def keep_sigint_handler(trainer: object) -> None:
    """Stop a trainer of Ray Train from replacing the process's Ctrl-C handler in `fit`.

    Ray's handler (https://github.com/ray-project/ray/pull/53600) aborts the training and exits with
    code 0, so an interrupted run would look like a finished one. Without it, Ctrl-C raises
    KeyboardInterrupt. Ray 2.60 has no setting for this.

    Args:
        trainer: a `ray.train.torch.TorchTrainer`.
    """

    def register_nothing(controller: object) -> None:
        pass

    trainer._register_sigint_handler = register_nothing  # type: ignore[attr-defined]
