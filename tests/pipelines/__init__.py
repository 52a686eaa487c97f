"""Pipeline folders in the released formats: every part real, tiny and random; a module a family."""
