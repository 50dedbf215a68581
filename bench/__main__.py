"""`python -m sp_fast.bench`: the benchmark commands from a checkout that is not installed."""

from sp_fast.bench.cli import app

if __name__ == "__main__":  # worker processes import this file too
    app(prog_name="sp-fast bench")
