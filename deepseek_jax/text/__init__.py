"""Text in and out: tokenizer, chat template, think tags."""
