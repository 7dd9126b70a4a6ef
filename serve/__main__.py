"""`python -m serve`, the same as `dermaflow serve`."""

from serve.cli import app

if __name__ == "__main__":
    app()
