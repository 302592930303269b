"""The unmodified model over pages: only its attention is ours."""
