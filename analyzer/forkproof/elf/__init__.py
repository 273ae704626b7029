"""Reading one ELF file: its headers and tables (image), function extents (unwind), names (names)."""
