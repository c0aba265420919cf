"""What a frozen network sees: numbers computed in one module each, drawn in another."""
