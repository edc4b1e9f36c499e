def main() -> None:
    pass


def build_engine() -> None:
    pass
