"""A GGUF file as the source of a conversion: names, floats, configuration and tokenizer in our terms."""
