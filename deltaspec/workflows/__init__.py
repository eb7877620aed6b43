"""Plain functions that join the rooms: options in, result out."""
