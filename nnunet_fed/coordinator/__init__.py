"""The coordinator: admits sites, keeps what they contribute, closes rounds, tells what happened."""
