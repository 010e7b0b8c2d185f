"""How roles talk: authentication, frames, and groups of workers."""
