"""An OpenAI-compatible HTTP server over one generator."""
