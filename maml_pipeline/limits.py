"""Upper bounds of settings, which catch typing errors."""

MAX_SEED = 2**32 - 1  # of NumPy's global generator, which Lightning seeds too
MAX_INNER_STEPS = 10_000  # each is a column of metrics.csv
MAX_EVALUATION_TASKS = 10_000_000
MAX_WORKERS = 256
MAX_ACCUMULATED_BATCHES = 1_000_000
MAX_BATCHES = 10**15
