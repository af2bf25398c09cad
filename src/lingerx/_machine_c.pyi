# The compiled machine shows Python its table and nothing else: its functions are C, for the native engine.
ROWS: tuple[tuple[int, int, int, int, int], ...]
