"""`python -m maml_pipeline` is the `maml` command."""

from maml_pipeline.cli.quick_exit import main

if __name__ == "__main__":
    main()
