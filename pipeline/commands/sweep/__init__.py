"""The sweep command: ordinary runs that share their earlier stages, ranked at the end."""
