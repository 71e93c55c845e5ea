"""What people type: arguments, text and JSON output, and a blocking client of the admin socket."""
