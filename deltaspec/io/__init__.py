"""Every foreign file format: beyond this room each matrix is (d_out, d_in) and its stored form is unknown."""
