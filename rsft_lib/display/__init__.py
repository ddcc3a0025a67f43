"""Tables and pictures for notebooks, a folder for each topic; nothing else imports these."""
