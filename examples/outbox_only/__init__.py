"""Two services, one topic and no saga: orders tells what happened, mailer acts on it once."""
