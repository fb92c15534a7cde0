"""Memory techniques: what backward keeps of everything else. They work on any model and know no WASI."""
